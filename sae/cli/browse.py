"""`sae browse`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from sae.cli.flags import add_verb


def browse(verbs: Any) -> None:
    verb = add_verb(
        verbs, "browse", _run_browse, "open the feature browser on a directory of runs", example="sae browse runs/"
    )
    verb.add_argument("root", nargs="?", default="runs", metavar="DIR", help="directory of runs")
    verb.add_argument("--port", type=int, default=8501, metavar="N", help="port on 127.0.0.1 (default: 8501)")
    verb.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="also answer to this host name, such as hub.example.org, for a proxy on this machine; may be repeated",
    )
    verb.add_argument(
        "--base-path",
        metavar="PATH",
        help="path below which a proxy shows the app, such as /user/ann/proxy/absolute/8501",
    )
    verb.add_argument(
        "--text-model",
        metavar="DIR",
        help="search by meaning with this sentence-transformers model (default: all-MiniLM-L6-v2, of the extra search)",
    )
    verb.add_argument("--no-open", action="store_true", help="do not open a browser window")


def _run_browse(args: argparse.Namespace) -> int:
    # In a separate process: `sae` is below `browser` and must not import it.
    command = [sys.executable, "-m", "browser.launch", args.root, "--port", str(args.port)]
    command += [f"--allow-host={host}" for host in args.allow_host or []]
    command += [f"--base-path={args.base_path}"] if args.base_path else []
    command += [f"--text-model={args.text_model}"] if args.text_model else []
    return subprocess.call(command + (["--no-open"] if args.no_open else []), env=_escaping(os.environ))


def _escaping(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python prints characters that the output's encoding lacks as escapes."""
    encoding, _, handler = environment.get("PYTHONIOENCODING", "").partition(":")
    return {**environment, "PYTHONIOENCODING": f"{encoding}:{handler or 'backslashreplace'}"}
