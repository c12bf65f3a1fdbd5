"""Measures what rounding dense products to bfloat16 (`matmul = bf16`) changes in the dictionary: L0, FVU, delta_ce.

    python scripts/bench_bf16.py --acts runs/a/acts.zarr --out runs/a/bf16 --tokens 1500000 --json bf16.json

For each seed, trains the same settings with the default products and with bf16 products, on the same rows in the same
order, and evaluates both on the held-out split. The result is the mean difference within pairs, next to the spread over
seeds. After an interruption, repeat the command.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import machine
import torch

import sae
from sae.training.config import parsed

METRICS = ("l0", "fvu", "delta_ce", "ce_loss_score_zero", "dead_share")
MODES = ("auto", "bf16")


def measured(args: argparse.Namespace, mode: str, seed: int) -> dict[str, Any]:
    out = args.out / f"{args.recipe}-{args.d_sae}-{mode}-s{seed}"
    settings = {"matmul": mode, **({"target_l0": args.l0} if args.l0 else {}), **parsed(args.set or [])}
    trained = sae.train(
        args.acts,
        out,
        recipe=args.recipe,
        d_sae=args.d_sae,
        tokens=args.tokens,
        seed=seed,
        config=settings,
        hook_point=args.hook_point,
    )
    report = out / "eval.json"
    metrics = (json.loads(report.read_text()) if report.is_file() else sae.evaluate(out))["metrics"]
    found = {name: metrics[name]["value"] for name in METRICS}
    return {"seed": seed, "matmul": mode, "chosen": trained.config["matmul"], **found}


def differences(runs: list[dict[str, Any]], metric: str) -> list[float]:
    """bf16 minus default, for each seed."""
    value = {(run["matmul"], run["seed"]): run[metric] for run in runs}
    return [value["bf16", seed] - value["auto", seed] for mode, seed in value if mode == "auto"]


def show(runs: list[dict[str, Any]]) -> None:
    print(f"\n| seed | products | {' | '.join(METRICS)} |\n|--:|---|{'--:|' * len(METRICS)}")
    for run in runs:
        print(f"| {run['seed']} | {run['chosen']} | {' | '.join(f'{run[name]:.5g}' for name in METRICS)} |")
    for what, of in (("mean difference", statistics.mean), ("its spread, sd", statistics.pstdev)):
        print(f"| | {what} | {' | '.join(f'{of(differences(runs, name)):+.2g}' for name in METRICS)} |")
    for mode in MODES:
        spread = (statistics.pstdev(run[name] for run in runs if run["matmul"] == mode) for name in METRICS)
        print(f"| | sd over seeds, {mode} | {' | '.join(f'{sd:.2g}' for sd in spread)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acts", type=Path, required=True, help="the activation store")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument(
        "--recipe", default="towards-monosemanticity", help="one with dense products shows the largest effect"
    )
    parser.add_argument("--hook-point", help="needed when the store holds several")
    parser.add_argument("--d-sae", type=int, default=4096, help="number of features")
    parser.add_argument("--l0", type=float, default=0.0, help="active features per token (default: the recipe's)")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="rows that each run sees")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds, two runs each")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="any other setting; repeats")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    runs = [measured(args, mode, seed) for seed in args.seeds for mode in MODES]
    show(runs)
    settings = {name: getattr(args, name) for name in ("recipe", "d_sae", "l0", "tokens", "set")}
    if args.json:
        content = {"hardware": machine.hardware(), "settings": settings, "runs": runs}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
