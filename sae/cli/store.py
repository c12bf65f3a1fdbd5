"""`sae store`: functions of `pipeline.stores`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sae.cli.flags import add_verb


def store(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "store",
        _run_store,
        "merge activation stores, copy a part of one, or write one as numpy arrays",
        example="sae store merge runs/a/acts.zarr runs/b/acts.zarr --out runs/ab/acts.zarr",
    )
    verb.add_argument(
        "action",
        choices=["merge", "subset", "export-numpy"],
        help="merge: several stores into one; subset: fewer hook points or tokens; export-numpy: .npy files",
    )
    verb.add_argument("stores", nargs="+", metavar="STORE", help="activation stores: several to merge, otherwise one")
    verb.add_argument("--out", required=True, metavar="PATH", help="the new store, or the directory of .npy files")
    verb.add_argument(
        "--hook-point",
        action="append",
        metavar="NAME",
        help="for subset and export-numpy: copy only this one; may be repeated (default: all)",
    )
    verb.add_argument(
        "--tokens", type=int, metavar="N", help="for subset: training tokens to copy, in whole shards (default: all)"
    )
    verb.add_argument(
        "--split", default="train", choices=["train", "heldout"], help="for export-numpy: training or held-out rows"
    )


def _run_store(args: argparse.Namespace) -> int:
    from sae import pipeline

    if args.action == "merge":
        repeated = pipeline.merge_stores(args.stores, args.out)
        if repeated:
            print(f"{repeated:,} documents are in more than one store; their rows count several times", file=sys.stderr)
    elif len(args.stores) != 1:
        raise ValueError(f"{args.action} takes one store, got {len(args.stores)}.")
    elif args.action == "subset":
        pipeline.subset_store(args.stores[0], args.out, hook_points=args.hook_point, tokens=args.tokens)
    else:
        pipeline.export_numpy(args.stores[0], args.out, hook_points=args.hook_point, split=args.split)
    print(args.out)
    return 0
