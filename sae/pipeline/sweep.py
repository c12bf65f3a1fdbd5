"""Many dictionaries at once: a grid of recipes, sizes, sparsities and seeds, and the frontier they draw."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from sae.analysis.pareto_plot import FRONTIER_FORMAT, picture
from sae.evaluation.evaluate import Ablated
from sae.pipeline.errors import PipelineError
from sae.pipeline.evaluate import evaluate
from sae.pipeline.rows import hook_point_of, provenance_of, rows_for
from sae.training import loop, recipes
from sae.training.config import TrainConfig
from sae.training.step import Diverged
from store.activations import ActivationStore
from store.common import TRAIN, write_json

MEASURED = ("l0", "fvu", "ce_loss_score_zero", "ce_loss_score_mean", "delta_ce", "dead_share")
DIVERGED = "diverged.json"
BYTES = 4  # of a float32


@dataclass(frozen=True)
class Point:
    """One run of a sweep; `name` is its directory."""

    name: str
    config: TrainConfig


def grid(
    names: Sequence[str], d_sae: Sequence[int], l0: Sequence[float], seeds: Sequence[int], **settings: Any
) -> list[Point]:
    """Every combination, resolved before any work. Raises: ValueError for what a recipe has no use for."""
    points = []
    for name, width, wanted, seed in product(names, d_sae, l0, seeds):
        recipe, config = recipes.resolve(name, d_sae=width, target_l0=wanted, seed=seed, **settings)
        if recipe.needs == "y":
            raise PipelineError(f"recipe {name} has another target than x: a frontier of x̂ has no place for it.")
        points.append(Point(f"{name}-{width}-l0_{wanted:g}-s{seed}", config))
    if len({point.name for point in points}) != len(points):
        raise PipelineError("the sweep names a recipe, size, L0 or seed twice.")
    return points


def sweep(
    store: str | Path,
    out: str | Path,
    *,
    names: Sequence[str],
    d_sae: Sequence[int] = (4096,),
    l0: Sequence[float] = (20.0,),
    seeds: Sequence[int] = (0,),
    tokens: int | None = None,
    config: dict[str, Any] | None = None,
    hook_point: str | None = None,
    kernels: str = "auto",
    device: str = "auto",
    memory_gb: float | None = None,
) -> Path:
    """Trains and evaluates a grid into `out`/<recipe>-<d_sae>-l0_<n>-s<seed>; returns the path of frontier.json.

    Runs of one seed whose states fit into `memory_gb` (default: half of what is free) are trained on one pass over the
    rows, each the same bit for bit as alone. Repeat the call to go on after an interruption; runs that are done stay.
    One that diverges is recorded with the reason (diverged.json, and in the frontier) and stays so: to try it again,
    delete its directory.
    Raises: ValueError for wrong settings, before any work; Interrupted on Ctrl-C or SIGTERM.
    """
    out = Path(out)
    acts = ActivationStore.open(store)
    hook = hook_point_of(acts, hook_point)
    settings = {"tokens": tokens or 4 * acts.totals(TRAIN, hook).kept_rows, **(config or {})}
    points = grid(names, d_sae, l0, seeds, **settings)
    budget = memory_gb * 1e9 if memory_gb else _free_bytes() / 2
    for group in _groups([p for p in points if not _done(out / p.name)], acts.hook_points[hook], budget):
        rows = rows_for(acts, hook, group[0].config, None)
        plans = [loop.Plan(out / p.name, p.config, provenance_of(acts, hook, out / p.name)) for p in group]
        trained = loop.train_together(rows, plans, kernels=kernels, device=device)
        for plan, found in zip(plans, trained, strict=True):
            if isinstance(found, Diverged):
                write_json(plan.out / DIVERGED, {"reason": str(found)})
    ablated: Ablated = {}
    for point in points:
        loop.claim_run(out / point.name, point.config, provenance_of(acts, hook, out / point.name))
        if not (out / point.name / DIVERGED).is_file() and not (out / point.name / "eval.json").is_file():
            evaluate(out / point.name, device=device, kernels=kernels, ablated=ablated)
    return write_frontier(out, points, model=acts.provenance["model"]["id"], hook_point=hook)


def write_frontier(out: Path, points: Sequence[Point], *, model: str, hook_point: str) -> Path:
    """frontier.json and frontier.svg of the runs in `out`, from their eval.json.

    `{"format": 1, "model", "hook_point", "runs": [{"id", "recipe", "d_sae", "target_l0", "seed", "rows", "lambda",
    "l0", "fvu", "ce_loss_score_zero", "ce_loss_score_mean", "delta_ce", "dead_share"}]}`; `id` is the directory, `rows`
    are those to be seen in training, `lambda` is in scaled units and 0 where sparsity is k. A run that diverged says
    why in "diverged" and has null for what was not measured.
    """
    runs = [
        {
            "id": point.name,
            **{name: getattr(point.config, name) for name in ("recipe", "d_sae", "target_l0", "seed")},
            "rows": point.config.steps * point.config.batch_tokens,
            **_outcome(out / point.name),
        }
        for point in points
    ]
    frontier = {"format": FRONTIER_FORMAT, "model": model, "hook_point": hook_point, "runs": runs}
    (out / "frontier.svg").write_text(picture(frontier))
    write_json(out / "frontier.json", frontier)
    return out / "frontier.json"


def _outcome(directory: Path) -> dict[str, Any]:
    """What a run of a sweep came to."""
    if (directory / DIVERGED).is_file():
        reason = json.loads((directory / DIVERGED).read_text())["reason"]
        return {"diverged": reason, "lambda": None, **dict.fromkeys(MEASURED)}
    metrics = json.loads((directory / "eval.json").read_text())["metrics"]
    about = json.loads((directory / "config.json").read_text())
    return {"lambda": about["lambda"]["scaled"], **{name: metrics[name]["value"] for name in MEASURED}}


def _done(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.json", DIVERGED))  # written last


def _groups(points: Sequence[Point], d_in: int, budget: float) -> Iterator[list[Point]]:
    """Runs that want the same rows in the same order, as many at once as the memory holds."""

    def same_rows(point: Point) -> tuple[int, int, str]:
        return point.config.seed, point.config.batch_tokens, recipes.recipe_named(point.config.recipe).needs

    for wanted in dict.fromkeys(same_rows(point) for point in points):
        group: list[Point] = []
        for point in (p for p in points if same_rows(p) == wanted):
            if group and sum(_bytes(p.config, d_in) for p in (*group, point)) > budget:
                yield group
                group = []
            group.append(point)
        yield group


def _bytes(config: TrainConfig, d_in: int) -> int:
    """Parameters, gradients and two moments of both matrices, and a dense step's three batches of activations."""
    return BYTES * config.d_sae * (4 * 2 * d_in + 3 * config.batch_tokens)


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
