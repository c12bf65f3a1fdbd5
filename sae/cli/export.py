"""`sae export`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import add_verb

EXPORT_FORMATS = ("native", "sae-lens", "dictionary-learning", "sparsify")  # as in sae.pipeline, without importing it
PAGE_FORMATS = ("sae-dashboard",)  # feature pages, from the dictionary's index


def export(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "export",
        _run_export,
        "write a dictionary, or its feature pages, in another tool's format",
        example="sae export runs/a/first --format sae-lens --out exported/first",
    )
    verb.add_argument("sae", metavar="DICTIONARY", help="directory of the dictionary")
    verb.add_argument(
        "--format",
        default="native",
        choices=(*EXPORT_FORMATS, *PAGE_FORMATS),
        help="the tool to write for; sae-dashboard (also for Neuronpedia) writes the feature pages of an indexed "
        "dictionary",
    )
    verb.add_argument(
        "--features",
        type=_numbers,
        metavar="LIST",
        help="with sae-dashboard: only these features, e.g. 0-99,512 (default: all)",
    )
    verb.add_argument("--out", required=True, metavar="DIR", help="directory to write, new or empty")


def _run_export(args: argparse.Namespace) -> int:
    from sae import pipeline

    if args.format in PAGE_FORMATS:
        print(pipeline.export_pages(args.sae, args.out, features=args.features))
        return 0
    if args.features is not None:
        raise ValueError("--features is for feature pages (--format sae-dashboard); a dictionary is written whole.")
    print(pipeline.export(args.sae, args.format, args.out))
    return 0


def _numbers(text: str) -> list[int]:
    """Feature numbers of a list such as 0-99,512. Raises: argparse.ArgumentTypeError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{part.strip()!r}: expected a number or a range such as 0-99")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers
