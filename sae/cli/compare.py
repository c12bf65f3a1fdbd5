"""`sae compare`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sae.cli.flags import add_verb


def compare(verbs: Any) -> None:
    verb = add_verb(verbs, "compare", _run_compare, "match the features of two dictionaries on the same tokens")
    verb.add_argument("a", help="directory of a dictionary")
    verb.add_argument("b", help="of another: other seed, size, or a model with the same tokenizer")
    verb.add_argument("--acts", help="the activation store whose text is used (default: A's)")
    verb.add_argument("--tokens", type=int, default=262_144, help="tokens compared on, held-out ones first")
    verb.add_argument("--seed", type=int, default=0, help="of the shuffled control")
    verb.add_argument("--out", help="directory to write (default: A/compare/B)")
    verb.add_argument("--json", action="store_true", help="print compare.json")


def _run_compare(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.cli.tables import compare_table

    result = pipeline.compare(args.a, args.b, store=args.acts, tokens=args.tokens, seed=args.seed, out=args.out)
    print(json.dumps(result, indent=2) if args.json else compare_table(result))
    return 0
