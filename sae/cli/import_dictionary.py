"""`sae import`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sae.cli.flags import add_verb

IMPORT_FORMATS = ("sae-lens", "dictionary-learning", "sparsify", "llamascopium", "nanda", "openai")
DUMP_FORMATS = ("sae-dashboard", "paper")  # feature pages without weights


def import_dictionary(verbs: Any) -> None:
    verb = add_verb(verbs, "import", _run_import, "take another tool's dictionary, or its feature pages to browse")
    verb.add_argument("source", help="directory, file, or hub:owner/repo[/path][@revision] (downloads)")
    verb.add_argument("--out", required=True, help="directory of the dictionary, by custom runs/<run>/<name>")
    verb.add_argument(
        "--format",
        choices=(*IMPORT_FORMATS, *DUMP_FORMATS),
        help="whose layout it is (default: as the files say); sae-dashboard (Neuronpedia too) and paper: feature pages",
    )
    verb.add_argument("--model", help="directory, shipped name or hub id to check it against and record")
    verb.add_argument("--hook-point", help="where it reads its activations (default: as the files say)")


def _run_import(args: argparse.Namespace) -> int:
    from sae import pipeline

    if args.format in DUMP_FORMATS:
        if args.model or args.hook_point:
            raise ValueError("--model and --hook-point are for dictionaries; feature pages are shown as they stand.")
        pipeline.import_dump(args.source, args.out, format=args.format)
        print(args.out)
        return 0

    sae = pipeline.import_dictionary(
        args.source, args.out, format=args.format, model=args.model, hook_point=args.hook_point
    )
    place = f"{sae.config['model'].get('id', 'a model it does not name')} at {sae.config['hook_point']}"
    print(f"{sae.config['imported']['format']}: {sae.show_shape()}, of {place}", file=sys.stderr)
    for note in sae.config["imported"]["notes"]:
        print(f"  {note}", file=sys.stderr)
    print(args.out)
    return 0
