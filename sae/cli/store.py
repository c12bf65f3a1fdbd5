"""`sae store`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sae.cli.flags import add_verb


def store(verbs: Any) -> None:
    verb = add_verb(verbs, "store", _run_store, "merge stores, cut one smaller, or write it as numpy arrays")
    verb.add_argument("action", choices=["merge", "subset", "export-numpy"])
    verb.add_argument("stores", nargs="+", help="several to merge, else one")
    verb.add_argument("--out", required=True, help="the new store, or the directory of .npy files")
    verb.add_argument("--hook-point", action="append", help="subset, export-numpy: these alone; may repeat")
    verb.add_argument("--tokens", type=int, help="subset: training tokens to keep, in whole shards")
    verb.add_argument("--split", default="train", choices=["train", "heldout"], help="export-numpy: which rows")


def _run_store(args: argparse.Namespace) -> int:
    from sae import pipeline

    if args.action == "merge":
        repeated = pipeline.merge_stores(args.stores, args.out)
        if repeated:
            print(f"{repeated:,} documents are in more than one store; their rows count again", file=sys.stderr)
    elif len(args.stores) != 1:
        raise ValueError(f"{args.action} takes one store, got {len(args.stores)}.")
    elif args.action == "subset":
        pipeline.subset_store(args.stores[0], args.out, hook_points=args.hook_point, tokens=args.tokens)
    else:
        pipeline.export_numpy(args.stores[0], args.out, hook_points=args.hook_point, split=args.split)
    print(args.out)
    return 0
