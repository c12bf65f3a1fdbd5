"""`sae controls`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sae.cli.flags import add_dictionary, add_dictionary_device, add_verb


def controls(verbs: Any) -> None:
    verb = add_verb(
        verbs, "controls", _run_controls, "measure a dictionary beside random, PCA, ICA, neurons and a shuffled model"
    )
    add_dictionary(verb)
    verb.add_argument("--tokens", type=int, default=65_536, help="held-out tokens measured on, as many to choose on")
    verb.add_argument("--train-tokens", type=int, default=1_000_000, help="rows the shuffled model's dictionary sees")
    verb.add_argument("--only", action="append", metavar="CONTROL", help="random, pca, …; may repeat (default: all)")
    verb.add_argument("--seed", type=int, default=0, help="of directions, ICA and the shuffle")
    add_dictionary_device(verb)
    verb.add_argument("--json", action="store_true", help="print controls.json")


def _run_controls(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.cli.tables import controls_table

    result = pipeline.controls(
        args.sae,
        store=args.acts,
        model=args.model,
        tokens=args.tokens,
        train_tokens=args.train_tokens,
        only=args.only,
        seed=args.seed,
        device=args.device,
        report=lambda line: print(line, file=sys.stderr),
    )
    print(json.dumps(result, indent=2) if args.json else controls_table(result))
    return 0
