"""`sae export`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import add_verb

# As in sae.pipeline, without its imports.
EXPORT_FORMATS = ("native", "sae-lens", "dictionary-learning", "sparsify")


def export(verbs: Any) -> None:
    verb = add_verb(verbs, "export", _run_export, "write a dictionary in another tool's layout")
    verb.add_argument("sae", help="directory of the dictionary")
    verb.add_argument("--format", default="native", choices=EXPORT_FORMATS, help="layout")
    verb.add_argument("--out", required=True, help="directory to write")


def _run_export(args: argparse.Namespace) -> int:
    from sae import pipeline

    print(pipeline.export(args.sae, args.format, args.out))
    return 0
