"""`sae sweep`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import Renamed, add_kernels, add_settings, add_verb, settings, size


def sweep(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "sweep",
        _run_sweep,
        "train and evaluate every combination of recipes, sizes, sparsities and seeds",
        example="sae sweep --acts runs/a/acts.zarr --recipe topk --recipe balanced --d-sae 4096 --l0 5 --l0 20 "
        "--out runs/a/sweep",
    )
    verb.add_argument("--acts", required=True, metavar="STORE", help="activation store to train on")
    verb.add_argument("--out", required=True, metavar="DIR", help="directory of the sweep, e.g. runs/a/sweep")
    verb.add_argument(
        "--recipe", action="append", required=True, metavar="NAME", help="training recipe; may be repeated"
    )
    verb.add_argument(
        "--d-sae", type=int, action="append", required=True, metavar="N", help="number of features; may be repeated"
    )
    verb.add_argument(
        "--l0",
        type=float,
        action="append",
        required=True,
        metavar="N",
        help="mean number of active features per token to aim for; may be repeated",
    )
    verb.add_argument(
        "--seed",
        type=int,
        action="append",
        metavar="N",
        help="seed of the initial weights and the row order; may be repeated (default: 0)",
    )
    verb.add_argument("--tokens", type=int, metavar="N", help="rows for each run (default: four epochs of the store)")
    add_settings(verb)
    verb.add_argument("--hook-point", metavar="NAME", help="needed if the store holds several")
    verb.add_argument(
        "--max-ram",
        type=size,
        metavar="SIZE",
        help="memory for dictionaries that are trained at the same time, e.g. 4GB (default: half of what is free)",
    )
    verb.add_argument("--memory-gb", action=Renamed, const="--max-ram (with a unit: 4GB)", help=argparse.SUPPRESS)
    add_kernels(verb)


def _run_sweep(args: argparse.Namespace) -> int:
    from sae import pipeline

    frontier = pipeline.sweep(
        args.acts,
        args.out,
        recipes=args.recipe,
        d_sae=args.d_sae,
        l0=args.l0,
        seeds=args.seed or [0],
        tokens=args.tokens,
        config=settings(args),
        hook_point=args.hook_point,
        kernels=args.kernels,
        device=args.device,
        max_ram_bytes=args.max_ram,
        over_ranks=True,
    )
    if frontier:
        print(frontier)
    return 0
