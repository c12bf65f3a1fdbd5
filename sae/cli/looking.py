"""Verbs that show: the browser, what an artefact is."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from sae.cli.flags import add_verb


def browse(verbs: Any) -> None:
    verb = add_verb(verbs, "browse", _run_browse, "open the feature browser on a directory of runs")
    verb.add_argument("root", nargs="?", default="runs", help="directory of runs")
    verb.add_argument("--port", type=int, default=8501, help="on 127.0.0.1")
    verb.add_argument("--no-open", action="store_true", help="do not open a browser window")


def _run_browse(args: argparse.Namespace) -> int:
    # A process of its own: `sae` is below `browser` and does not import it.
    command = [sys.executable, "-m", "browser.launch", args.root, "--port", str(args.port)]
    return subprocess.call(command + (["--no-open"] if args.no_open else []))


def info(verbs: Any) -> None:
    verb = add_verb(verbs, "info", _run_info, "describe a dictionary, store, index, model or run, or this machine")
    verb.add_argument("path", nargs="?", help="without one: the kernels and products chosen here, and why")
    verb.add_argument("--feature", type=int, metavar="N", help="show one feature of a dictionary's index")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _run_info(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.report import description

    if args.feature is not None:
        if not args.path:
            raise ValueError("--feature is of a dictionary: name its directory before it.")
        feature = pipeline.describe_feature(args.path, args.feature)
        print(json.dumps(feature, indent=2, ensure_ascii=False) if args.json else pipeline.feature_text(feature))
        return 0
    found = pipeline.describe(args.path)
    print(json.dumps(found, indent=2, default=str) if args.json else description(found))
    return 0
