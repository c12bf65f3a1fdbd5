"""`sae index`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import add_dictionary, add_kernels, add_verb
from sae.jobs.ranks import is_first_rank


def index(verbs: Any) -> None:
    verb = add_verb(
        verbs, "index", _run_index, "build the feature index that the browser reads", example="sae index runs/a/first"
    )
    add_dictionary(verb)
    add_kernels(verb)
    verb.add_argument(
        "--tokens",
        type=int,
        default=1_000_000,
        metavar="N",
        help="tokens to index: held-out ones, then spread training text",
    )


def _run_index(args: argparse.Namespace) -> int:
    from sae import pipeline

    path = pipeline.index(
        args.sae,
        store=args.acts,
        model=args.model,
        tokens=args.tokens,
        device=args.device,
        kernels=args.kernels,
        over_ranks=True,
    )
    if is_first_rank():
        print(path)
    return 0
