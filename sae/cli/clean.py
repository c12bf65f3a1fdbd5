"""`sae clean`: a function of `pipeline.stores`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import add_verb


def clean(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "clean",
        _run_clean,
        "delete the unfinished files that killed processes left in activation stores",
        example="sae clean runs/a --dry-run",
    )
    verb.add_argument("path", metavar="PATH", help="an activation store, or a directory that holds some")
    verb.add_argument(
        "--acts",
        action="store_true",
        help="delete the stores themselves; refused while a dictionary next to one has no feature index",
    )
    verb.add_argument("--dry-run", action="store_true", help="list what would be deleted, and delete nothing")


def _run_clean(args: argparse.Namespace) -> int:
    from sae import pipeline

    deleted = pipeline.clean(args.path, acts=args.acts, dry_run=args.dry_run)
    for name, n_bytes in deleted.items():
        print(f"{n_bytes:>14,} bytes  {name}")
    print(f"{sum(deleted.values()):,} bytes {'would be freed' if args.dry_run else 'freed'}")
    return 0
