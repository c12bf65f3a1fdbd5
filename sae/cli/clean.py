"""`sae clean`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import add_verb


def clean(verbs: Any) -> None:
    verb = add_verb(verbs, "clean", _run_clean, "remove what killed writers left in a store or a run")
    verb.add_argument("path")
    verb.add_argument("--acts", action="store_true", help="also the stores, once every dictionary is indexed")
    verb.add_argument("--dry-run", action="store_true", help="say what would go")


def _run_clean(args: argparse.Namespace) -> int:
    from sae import pipeline

    removed = pipeline.clean(args.path, acts=args.acts, dry_run=args.dry_run)
    for name, taken in removed.items():
        print(f"{taken:>14,} bytes  {name}")
    print(f"{sum(removed.values()):,} bytes {'would be' if args.dry_run else 'are'} free")
    return 0
