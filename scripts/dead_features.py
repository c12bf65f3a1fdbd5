"""Compares cures for dead features by what they leave alive: none, naive re-initialisation, the paper's resampling.

    python scripts/dead_features.py --acts runs/a/acts.zarr --out runs/a/dead --tokens 2000000 --json dead.json

Trains the recipe towards-monosemanticity three times, with the same settings except for what happens to dead features
at its resampling steps, and counts the features that fire on held-out text. `naive` draws new weights for dead features
as at the start (Kaiming uniform, unit decoder rows, bias 0) and leaves Adam's moments unchanged, as an early
replication did. After an interruption, repeat the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import machine
import torch
from torch import Tensor

import sae
from sae.jobs.checkpoint import read_tensors
from sae.training.adam import Adam
from sae.training.config import parsed
from sae.training.recipes import RECIPES

RECIPE = "towards-monosemanticity"
COLUMNS = ("alive", "not_ultra_low", "l0", "fvu", "delta_ce")
ULTRA_LOW = 1e-5  # density


@torch.no_grad()
def reinitialise_(
    dictionary: sae.SAE, optimizer: Adam, dead: Tensor, rows: Tensor, losses: Tensor, generator: torch.Generator
) -> Tensor:
    """Replaces `resample_`: new weights as at the start, which depend on no row, so each parent row is -1."""
    n, d_in = len(dead), dictionary.d_in
    bound = d_in**-0.5
    dictionary.W_enc[:, dead] = (2 * torch.rand(d_in, n, generator=generator) - 1) * bound
    dictionary.W_dec[dead] = torch.nn.functional.normalize(2 * torch.rand(n, d_in, generator=generator) - 1, dim=-1)
    dictionary.b_enc[dead] = 0.0
    return torch.full((n,), -1)


def cures() -> dict[str, tuple[dict[str, Any], AbstractContextManager[Any]]]:
    """Of each cure: its settings, and a patch of the paper's procedure."""
    return {
        "none": ({"resample_shares": ()}, nullcontext()),
        "naive": ({}, patch.dict(RECIPES, {RECIPE: replace(RECIPES[RECIPE], resample=reinitialise_)})),
        "paper": ({}, nullcontext()),
    }


def measured(directory: Path, ablated: dict[str, Any]) -> dict[str, Any]:
    """One line of the table, measured on all held-out tokens."""
    result = sae.evaluate(directory, ablated=ablated)
    count = read_tensors(directory / "feature_stats.safetensors")[0]["count"]
    return {
        "alive": int((count > 0).sum()),
        "not_ultra_low": int((count > ULTRA_LOW * result["tokens"]).sum()),
        **{name: result["metrics"][name]["value"] for name in ("l0", "fvu", "delta_ce")},
        "heldout_tokens": result["tokens"],
        "events": sae.load(directory).config["resample_events"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acts", type=Path, required=True, help="the activation store")
    parser.add_argument("--hook-point", help="needed when the store holds several")
    parser.add_argument("--out", type=Path, required=True, help="directory of the three dictionaries")
    parser.add_argument("--d-sae", type=int, default=4096, help="number of features")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="rows each run sees")
    parser.add_argument("--seed", type=int, default=0, help="seed of all three runs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all three runs; repeats"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    given = parsed(args.set)
    found: dict[str, Any] = {}
    ablated: dict[str, Any] = {}
    print(f"{'cure':8} " + " ".join(f"{name:>14}" for name in COLUMNS))
    for name, (settings, patched) in cures().items():
        with patched:
            sae.train(
                args.acts,
                args.out / name,
                recipe=RECIPE,
                d_sae=args.d_sae,
                tokens=args.tokens,
                seed=args.seed,
                hook_point=args.hook_point,
                config=given | settings,
            )
        found[name] = measured(args.out / name, ablated)
        print(f"{name:8} " + " ".join(f"{found[name][column]:14,.4g}" for column in COLUMNS), flush=True)
    summary = {
        "hardware": machine.hardware(),
        "recipe": RECIPE,
        "d_sae": args.d_sae,
        "rows": args.tokens,
        "seed": args.seed,
        "settings": given,
        "results": found,
    }
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
