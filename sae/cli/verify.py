"""`sae verify`: a function of `pipeline.stores`; with --repair also `pipeline.repair`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import MODEL, add_device, add_text, add_verb


def verify(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "verify",
        _run_verify,
        "check every checksum of an activation store",
        example="sae verify runs/a/acts.zarr",
    )
    verb.add_argument("path", metavar="STORE", help="the activation store")
    verb.add_argument("--repair", action="store_true", help="harvest only the damaged shards again")
    verb.add_argument(
        "--model", help=f"for --repair: the store's model, if it was moved ({MODEL}); its weights must be the same"
    )
    add_text(verb, required=False, help="for --repair: the store's text, if it was moved; may be repeated")
    add_device(verb, mps=True)


def _run_verify(args: argparse.Namespace) -> int:
    from sae import pipeline

    if not args.repair:
        left = pipeline.verify(args.path)
    else:
        found, left = pipeline.repair(args.path, model=args.model, text=args.text, device=args.device)
        for problem in found:
            print(f"found: {problem}")
    for problem in left:
        print(problem)
    if left:
        print(f"{args.path}: {len(left)} problem{'s' if len(left) > 1 else ''}")
        return 1
    print(f"{args.path}: every checksum holds")
    return 0
