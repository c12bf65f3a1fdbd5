"""`sae controls`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sae.cli.flags import add_device, add_dictionary, add_verb


def controls(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "controls",
        _run_controls,
        "measure a dictionary and its controls: random directions, PCA, ICA, neurons, a shuffled model",
        example="sae controls runs/a/first --only random --only pca",
    )
    add_dictionary(verb)
    verb.add_argument(
        "--tokens",
        type=int,
        default=65_536,
        metavar="N",
        help="held-out tokens to measure on; features are chosen on the same number of training tokens",
    )
    verb.add_argument(
        "--train-tokens",
        type=int,
        default=1_000_000,
        metavar="N",
        help="rows to train the shuffled model's dictionary on",
    )
    verb.add_argument(
        "--only",
        action="append",
        metavar="CONTROL",
        help="measure this control: random, pca, ica, neurons, neurons_topk or shuffled_model; may be repeated "
        "(default: all)",
    )
    verb.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random directions, of ICA and of the shuffle"
    )
    add_device(verb)
    verb.add_argument("--json", action="store_true", help="print controls.json instead of a table")


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
