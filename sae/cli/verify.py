"""`sae verify`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import add_device, add_text, add_verb, resolved_device


def verify(verbs: Any) -> None:
    verb = add_verb(verbs, "verify", _run_verify, "check every checksum of an activation store")
    verb.add_argument("path")
    verb.add_argument("--repair", action="store_true", help="harvest again what is wrong, and nothing else")
    verb.add_argument("--model", help="where the store's model is now (its hash must be the store's)")
    add_text(verb, required=False)
    add_device(verb)


def _run_verify(args: argparse.Namespace) -> int:
    from sae import pipeline

    if not args.repair:
        left = pipeline.verify(args.path)
    else:
        found, left = pipeline.repair(args.path, model=args.model, text=args.text, device=resolved_device(args.device))
        for problem in found:
            print(f"found: {problem}")
    for problem in left:
        print(problem)
    print(f"{args.path}: {len(left)} found wrong" if left else f"{args.path}: every checksum holds")
    return 1 if left else 0
