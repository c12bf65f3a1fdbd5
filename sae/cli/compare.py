"""`sae compare`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sae.cli.flags import add_device, add_verb


def compare(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "compare",
        _run_compare,
        "match the features of two dictionaries on the same tokens",
        example="sae compare runs/a/first runs/b/second",
    )
    verb.add_argument("a", metavar="A", help="directory of a dictionary")
    verb.add_argument(
        "b", metavar="B", help="directory of another one: of another seed or size, or of a model with A's tokenizer"
    )
    verb.add_argument(
        "--acts", metavar="STORE", help="activation store whose text is used (default: the one A was trained on)"
    )
    verb.add_argument(
        "--tokens",
        type=int,
        default=262_144,
        metavar="N",
        help="tokens to compare on: held-out ones, then spread training text",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the shuffled control")
    verb.add_argument("--out", metavar="DIR", help="directory of the result (default: A/compare/B)")
    add_device(verb)
    verb.add_argument("--json", action="store_true", help="print compare.json instead of a table")


def _run_compare(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.cli.tables import compare_table

    result = pipeline.compare(
        args.a, args.b, store=args.acts, tokens=args.tokens, seed=args.seed, out=args.out, device=args.device
    )
    print(json.dumps(result, indent=2) if args.json else compare_table(result))
    return 0
