"""`sae browse`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from sae.cli.flags import add_verb


def browse(verbs: Any) -> None:
    verb = add_verb(
        verbs, "browse", _run_browse, "open the feature browser on a directory of runs", example="sae browse runs/"
    )
    verb.add_argument("root", nargs="?", default="runs", metavar="DIR", help="directory of runs")
    verb.add_argument("--port", type=int, default=8501, metavar="N", help="port on 127.0.0.1 (default: 8501)")
    verb.add_argument("--no-open", action="store_true", help="do not open a browser window")


def _run_browse(args: argparse.Namespace) -> int:
    # In a separate process: `sae` is below `browser` and must not import it.
    command = [sys.executable, "-m", "browser.launch", args.root, "--port", str(args.port)]
    return subprocess.call(command + (["--no-open"] if args.no_open else []))
