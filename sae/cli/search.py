"""`sae search`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sae.cli.flags import add_verb


def search(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "search",
        _run_search,
        "find the features of an indexed dictionary that are closest in meaning to a text (extra: search)",
        example='sae search runs/a/first "names of months"',
    )
    verb.add_argument("sae", metavar="DICTIONARY", help="directory of a dictionary with a feature index")
    verb.add_argument("text", metavar="TEXT", help="what to search for, in the language of the text model (English)")
    verb.add_argument("--n", type=int, default=10, metavar="N", help="number of features to list")
    verb.add_argument(
        "--text-model",
        metavar="DIR",
        help="directory of a sentence-transformers model (default: all-MiniLM-L6-v2, which the extra search brings)",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")


def _run_search(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.cli.tables import found_table

    found = pipeline.search(args.sae, args.text, n=args.n, text_model=args.text_model)
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else found_table(found))
    return 0
