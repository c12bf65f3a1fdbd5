"""`sae export`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import add_verb

EXPORT_FORMATS = ("native", "sae-lens", "dictionary-learning", "sparsify")  # as in sae.pipeline, without importing it


def export(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "export",
        _run_export,
        "write a dictionary in another tool's format",
        example="sae export runs/a/first --format sae-lens --out exported/first",
    )
    verb.add_argument("sae", metavar="DICTIONARY", help="directory of the dictionary")
    verb.add_argument("--format", default="native", choices=EXPORT_FORMATS, help="the tool to write for")
    verb.add_argument("--out", required=True, metavar="DIR", help="directory to write, new or empty")


def _run_export(args: argparse.Namespace) -> int:
    from sae import pipeline

    print(pipeline.export(args.sae, args.format, args.out))
    return 0
