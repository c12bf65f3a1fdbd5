"""`sae import`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sae.cli.flags import MODEL, add_verb

IMPORT_FORMATS = (
    "sae-lens",
    "dictionary-learning",
    "sparsify",
    "llamascopium",
    "llama-scope",
    "gemma-scope",
    "gemma-scope-2",
    "goodfire",
    "qwen-scope",
    "nanda",
    "openai",
)
DUMP_FORMATS = ("sae-dashboard", "paper")  # feature pages without weights


def import_dictionary(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "import",
        _run_import,
        "read another tool's dictionary, or its feature pages to browse",
        example="sae import downloads/their-sae --model gelu-1l --out runs/theirs/first",
    )
    verb.add_argument(
        "source", metavar="SOURCE", help="directory or file, or hub:owner/repo[/path][@revision], which is downloaded"
    )
    verb.add_argument("--out", required=True, metavar="DIR", help="directory of the dictionary, e.g. runs/a/theirs")
    verb.add_argument(
        "--format",
        choices=(*IMPORT_FORMATS, *DUMP_FORMATS),
        help="the tool that wrote it (default: recognised from the files); sae-dashboard (also for Neuronpedia) and "
        "paper are feature pages",
    )
    verb.add_argument("--model", help=f"the model to check the dictionary against and to record: {MODEL}")
    verb.add_argument(
        "--hook-point", metavar="NAME", help="where in the model it reads (default: as recorded in the files)"
    )
    verb.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="SETTING",
        help="leave out this setting of the other tool's configuration, which is otherwise refused or folded; this is "
        "recorded; may repeat",
    )


def _run_import(args: argparse.Namespace) -> int:
    from sae import pipeline

    if args.format in DUMP_FORMATS:
        if args.model or args.hook_point or args.ignore:
            raise ValueError(
                "--model, --hook-point and --ignore are for dictionaries; feature pages are imported as they are."
            )
        pipeline.import_dump(args.source, args.out, format=args.format)
        print(args.out)
        return 0

    sae = pipeline.import_dictionary(
        args.source, args.out, format=args.format, model=args.model, hook_point=args.hook_point, ignore=args.ignore
    )
    place = f"{sae.config['model'].get('id', 'an unnamed model')} at {sae.config['hook_point']}"
    print(f"{sae.config['imported']['format']}: {sae.show_shape()}, of {place}", file=sys.stderr)
    for note in sae.config["imported"]["notes"]:
        print(f"  {note}", file=sys.stderr)
    print(args.out)
    return 0
