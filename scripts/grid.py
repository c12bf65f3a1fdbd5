"""The frontier of recipes on a corpus, with what fidelity does not show: domains, probes, alignment with neurons.

    sae harvest --text corpus.jsonl.xz --out runs/grid/acts.zarr --tokens 6200000 --hook-point blocks.0.mlp.hook_post \\
        --hook-point blocks.0.hook_resid_mid --hook-point blocks.0.mlp.hook_in --hook-point blocks.0.hook_mlp_out
    python scripts/grid.py --acts runs/grid/acts.zarr --json docs/measurements/grid.json --l0 5 --l0 20
    python scripts/grid.py --acts runs/grid/acts.zarr --json docs/measurements/grid.json --recipe topk --l0 2 --seed 1
    python scripts/grid.py --json docs/measurements/grid.json   # the table of what is there
    python scripts/grid.py --json docs/measurements/grid.json --domains --l0 20   # F1 by domain instead

Trains every combination beside the store, evaluates it on all held-out tokens, and adds one entry to the JSON as each
is done; what is there with the same settings and rows is not trained again. `--processes 2` shares the processor among
runs of one thread each. Repeat the command to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

HOOK = "blocks.0.mlp.hook_post"
TRANSCODED = ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")
FIDELITY = ("l0", "fvu", "ce_loss_score_zero", "ce_loss_score_mean", "delta_ce", "dead_share", "ultra_low_share")
QUALITY = ("mean_f1", "pure_features", "probe_k1", "probe_k5", "top_neuron")
COLUMNS = (*FIDELITY, *QUALITY)
PROBE_TOKENS = 65_536


@dataclass(frozen=True)
class Point:
    """One run."""

    recipe: str
    d_sae: int
    l0: float
    seed: int
    tokens: int
    settings: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        changed = "".join(f"-{name}_{value}" for name, value in self.settings)
        return f"{self.recipe}-{self.d_sae}-l0_{self.l0:g}{changed}-{self.tokens / 1e6:g}M-s{self.seed}"


def run(acts: Path, point: Point) -> dict[str, Any]:
    """Trains and measures one point; one entry of the JSON."""
    import machine

    import sae
    from sae.training import recipes

    out = acts.parent / point.name
    transcodes = recipes.recipe_named(point.recipe).needs == "y"
    hook, target = TRANSCODED if transcodes else (HOOK, None)
    sae.train(
        acts,
        out,
        recipe=point.recipe,
        d_sae=point.d_sae,
        tokens=point.tokens,
        seed=point.seed,
        hook_point=hook,
        target_hook_point=target,
        config={"target_l0": point.l0, **dict(point.settings)},
    )
    result = sae.evaluate(out, ablated=_ABLATED.setdefault(target or hook, {}))
    about = json.loads((out / "config.json").read_text())
    metrics = result["metrics"]
    entry = {
        "recipe": point.recipe,
        "d_sae": point.d_sae,
        "target_l0": point.l0,
        "seed": point.seed,
        "rows": point.tokens,
        "settings": dict(point.settings),
        "store_rows_sha256": about["store"]["rows_sha256"],
        "batch_tokens": about["train"]["batch_tokens"],
        "lambda": about["lambda"]["scaled"],
        "heldout_tokens": result["tokens"],
        **{name: metrics[name]["value"] for name in FIDELITY},
        "shrinkage": metrics["shrinkage"]["value"],
        "mean_f1": result["domains"]["mean_f1"],
        "pure_features": result["domains"]["pure_features"],
        "best_f1": {name: found and round(found["f1"], 3) for name, found in result["domains"]["best_feature"].items()},
        "top_neuron": result["decoder"]["top_neuron"]["median"],
        "nearest_cosine": result["decoder"]["nearest_cosine"]["median"],
        "eval_format": result["format"],
        "hardware": machine.hardware(),
    }
    if not transcodes:
        probed = _setup(acts, hook, str(about["model"]["id"])).probed(sae.load(out), learned=True)
        entry |= {f"probe_{k}": value for k, value in probed["probe"].items()}
        entry["absorption"] = probed["absorption"] and probed["absorption"]["mean"]
    return entry


@cache
def _setup(acts: Path, hook_point: str, model: str) -> Any:
    import sae
    from sae.pipeline.controls import Setup
    from store.activations import ActivationStore

    return Setup(ActivationStore.open(acts), sae.load_model(model), hook_point, PROBE_TOKENS)


_ABLATED: dict[str, Any] = {}  # of a process: what all dictionaries of a hook point have in common


def _one_thread() -> None:
    import numba
    import torch

    torch.set_num_threads(1)
    numba.set_num_threads(1)


def missing(points: Iterable[Point], held: dict[str, Any], rows_sha256: str) -> list[Point]:
    def there(point: Point) -> bool:
        entry = held.get(point.name)
        return bool(entry) and entry["rows"] == point.tokens and entry["store_rows_sha256"] == rows_sha256

    return [point for point in points if not there(point)]


def add(path: Path, name: str, entry: dict[str, Any]) -> None:
    """One more entry, the file whole at any moment."""
    from store.common import write_json

    held = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, held | {name: entry})


def table(held: dict[str, Any]) -> str:
    """One line for each recipe and sparsity: the value, or over seeds the mean and the range."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in held.values():
        key = (entry["target_l0"], entry["recipe"], entry["d_sae"], json.dumps(entry["settings"]), entry["rows"])
        groups.setdefault(key, []).append(entry)
    lines = [f"| L0 asked | recipe | seeds | {' | '.join(COLUMNS)} |", "|--:|---|--:" + "|--:" * len(COLUMNS) + "|"]
    for key in sorted(groups, key=str):
        cells = [_cell([entry.get(column) for entry in groups[key]]) for column in COLUMNS]
        settings = "" if key[3] == "{}" else f" {key[3]}"
        lines.append(f"| {key[0]:g} | {key[1]}{settings} | {len(groups[key])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def domain_table(held: dict[str, Any], l0: float) -> str:
    """Held-out F1 of the best single feature for each domain, a column for each recipe asked for this L0."""
    groups: dict[str, list[dict[str, float | None]]] = {}
    asked = [entry for entry in held.values() if entry["target_l0"] == l0]
    usual = statistics.mode(entry["rows"] for entry in asked) if asked else 0
    for entry in asked:
        settings = "" if not entry["settings"] else f" {json.dumps(entry['settings'])}"
        length = "" if entry["rows"] == usual else f", {entry['rows']:,} rows"
        groups.setdefault(entry["recipe"] + settings + length, []).append(entry["best_f1"])
    names = sorted({domain for found in groups.values() for best in found for domain in best})
    lines = [f"| domain | {' | '.join(groups)} |", "|---|" + "--:|" * len(groups)]
    for name in names:
        cells = [_cell([best.get(name) for best in found]) for found in groups.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    shown = f"{statistics.mean(known):.4g}"
    return shown if len(known) == 1 else f"{shown} ({min(known):.4g} to {max(known):.4g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acts", type=Path, help="the store; without it, only the table is printed")
    parser.add_argument("--json", type=Path, required=True, help="the file that entries are added to")
    parser.add_argument("--recipe", action="append", help="may repeat (default: all)")
    parser.add_argument("--l0", action="append", type=float, help="may repeat (default: 5 and 20)")
    parser.add_argument("--seed", action="append", type=int, help="may repeat (default: 0)")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="rows each run sees")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--domains", action="store_true", help="print the best features' F1 by domain, train nothing")
    args = parser.parse_args()
    held = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.domains:
        print("\n\n".join(domain_table(held, l0) for l0 in args.l0 or [20.0]))
        return 0
    if args.acts is None:
        print(table(held))
        return 0
    from sae.training import recipes
    from store.activations import ActivationStore

    settings = tuple((name, json.loads(value)) for name, _, value in (entry.partition("=") for entry in args.set))
    points = [
        Point(recipe, args.d_sae, l0, seed, args.tokens, settings)
        for l0, seed, recipe in product(args.l0 or [5.0, 20.0], args.seed or [0], args.recipe or list(recipes.RECIPES))
    ]
    todo = missing(points, held, ActivationStore.open(args.acts).fingerprint("train"))
    print(f"{len(todo)} of {len(points)} runs to do", flush=True)
    failed = []
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), _one_thread) as pool:
        running = {pool.submit(run, args.acts.resolve(), point): point for point in todo}
        for future in as_completed(running):
            point = running[future]
            try:
                entry = future.result()
            except Exception as error:  # the others go on; what failed is said at the end
                failed.append(f"{point.name}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
                continue
            add(args.json, point.name, entry)
            print(f"{point.name}: " + ", ".join(f"{name} {_cell([entry.get(name)])}" for name in COLUMNS), flush=True)
    print(table(json.loads(args.json.read_text()) if args.json.exists() else {}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
