"""`sae sweep`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import _refuse_many_processes, add_kernels, add_verb


def sweep(verbs: Any) -> None:
    verb = add_verb(verbs, "sweep", _run_sweep, "train and evaluate a grid of dictionaries; draws their frontier")
    verb.add_argument("--acts", required=True, help="the activation store")
    verb.add_argument("--out", required=True, help="directory of the sweep, by custom runs/<run>/<sweep>")
    verb.add_argument("--recipe", action="append", required=True, help="may repeat")
    verb.add_argument("--d-sae", type=int, action="append", required=True, help="number of features; may repeat")
    verb.add_argument("--l0", type=float, action="append", required=True, help="active features per token; may repeat")
    verb.add_argument("--seed", type=int, action="append", help="of initialisation and row order; may repeat (0)")
    verb.add_argument("--tokens", type=int, help="rows each run sees (default: four epochs of the store)")
    verb.add_argument("--batch-tokens", type=int, help="rows per step")
    verb.add_argument("--set", action="append", metavar="NAME=VALUE", help="any other setting of every run; repeats")
    verb.add_argument("--hook-point", help="needed when the store holds several")
    verb.add_argument("--memory-gb", type=float, help="for runs trained at once (default: half of what is free)")
    add_kernels(verb)


def _run_sweep(args: argparse.Namespace) -> int:
    _refuse_many_processes("sweep")
    from sae import pipeline
    from sae.training.config import parsed

    batch = {"batch_tokens": args.batch_tokens} if args.batch_tokens else {}
    frontier = pipeline.sweep(
        args.acts,
        args.out,
        names=args.recipe,
        d_sae=args.d_sae,
        l0=args.l0,
        seeds=args.seed or [0],
        tokens=args.tokens,
        config=batch | parsed(args.set or []),
        hook_point=args.hook_point,
        kernels=args.kernels,
        device=args.device,
        memory_gb=args.memory_gb,
    )
    print(frontier)
    return 0
