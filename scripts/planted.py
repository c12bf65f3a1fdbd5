"""Measures how much of a planted dictionary each recipe recovers; prints a table, writes JSON.

    python scripts/planted.py --recipes topk,towards-monosemanticity --size small --tokens 4000000 --out runs/planted
    python scripts/planted.py --recipes topk --size large --seeds 0,1 --set k=20

`small` has 512 true features in 256 dimensions, 5 active per row; `large` has 4,096 in 512 dimensions, 20 active. The
dictionary has as many features as there are true ones, unless --d-sae says otherwise. Recipes with a k get the number
of active features as k, those with an L1 penalty get λ = 1, which shrinks a true feature by about a twelfth. Recipes
that need more than rows (a transcoder's y, a model to run on) are left out, with a message. `random` is the control:
the same number of random directions. After an interruption, repeat the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import machine
import torch

import sae
from sae.analysis.matching import recovery
from sae.analysis.planted import PlantedRows, judge
from sae.training.config import parsed
from sae.training.recipes import RECIPES, recipe_named

SIZES = {
    "small": {"n_truths": 512, "d_in": 256, "active": 5.0, "decay": 0.99},
    "large": {"n_truths": 4096, "d_in": 512, "active": 20.0, "decay": 0.99 ** (1 / 8)},  # the same range of frequencies
}
L1 = 1.0  # in scaled units, where an active true feature is about 6 and the penalty subtracts λ / 2 from it
COLUMNS = (
    *("mmcs_truth", "mmcs_learned", "mcc", "recovered", "f_correlation", "fvu", "l0", "dead_share"),
    *("bench_f1", "bench_mcc", "uniqueness"),  # as SynthSAEBench defines them
)


def settings_of(recipe: str, active: float, given: dict[str, Any]) -> dict[str, Any]:
    if RECIPES[recipe].coefficient == "l1":
        return {"l1": L1} | given
    with_k = {"k": int(active)} if "k" in RECIPES[recipe].defaults and "target_l0" not in given else {}
    return with_k | given


def trainable(names: list[str]) -> list[str]:
    """The recipes that need nothing but rows; a line on stderr for each of the others."""
    for name in names:
        if needs := recipe_named(name).needs:
            print(
                f"{name}: left out, it needs {needs} in addition to x, which planted rows do not have", file=sys.stderr
            )
    return [name for name in names if not recipe_named(name).needs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="topk,towards-monosemanticity", help="comma-separated")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="the planted dictionary")
    parser.add_argument("--d-sae", type=int, help="number of features (default: that of the true ones)")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="rows that each run sees")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="rows per step")
    parser.add_argument(
        "--seeds", default="0", help="seeds of the true features, the rows and training; comma-separated"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every run; repeats"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/planted"), help="directory of the runs")
    args = parser.parse_args()
    given = parsed(args.set)
    given["batch_tokens"] = args.batch_tokens
    names = trainable(args.recipes.split(","))
    found = []
    print(f"{args.size}: {SIZES[args.size]}, {args.tokens:,} rows a run")
    print(f"{'recipe':26} {'seed':>4} " + " ".join(f"{name:>13}" for name in COLUMNS))
    for seed in map(int, args.seeds.split(",")):
        planted = PlantedRows(**SIZES[args.size], batch_tokens=args.batch_tokens, seed=seed)  # type: ignore[arg-type]
        d_sae = args.d_sae or planted.n_truths
        control = torch.randn(d_sae, planted.d_in, generator=torch.Generator().manual_seed(seed + 1))
        measured = {"random": recovery(control, planted.truths)}
        for recipe in names:
            name = "-".join(
                [args.size, recipe, str(d_sae), *(entry.replace("=", "") for entry in args.set), f"s{seed}"]
            )
            config = settings_of(recipe, planted.active, given)
            dictionary = sae.train(
                planted, args.out / name, recipe=recipe, d_sae=d_sae, tokens=args.tokens, seed=seed, config=config
            )
            measured[recipe] = judge(dictionary, planted)
        for recipe, values in measured.items():
            cells = " ".join(f"{values[name]:13.4f}" if name in values else f"{'–':>13}" for name in COLUMNS)
            print(f"{recipe:26} {seed:4} {cells}", flush=True)
            found.append({"recipe": recipe, "seed": seed, "d_sae": d_sae, "tokens": args.tokens, **values})
    summary = {
        "hardware": machine.hardware(),
        "size": args.size,
        "planted": SIZES[args.size],
        "settings": given,
        "results": found,
    }
    (args.out / f"{args.size}.json").write_text(json.dumps(summary, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
