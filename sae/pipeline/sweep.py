"""Train and evaluate a grid of dictionaries (recipes, sizes, sparsities, seeds), and plot their frontier."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from sae.analysis.pareto_plot import FRONTIER_FORMAT, picture
from sae.evaluation.evaluate import Ablated
from sae.jobs.ranks import rank_and_world
from sae.kernels import device_named
from sae.parallel.launch import own_gpu, ranks_here
from sae.pipeline.errors import PipelineError
from sae.pipeline.evaluate import evaluate
from sae.pipeline.rows import hook_point_of, provenance_of, rows_for, training_view
from sae.pipeline.stores import warn_of_few_rows
from sae.training import loop
from sae.training.begun import resolve_in
from sae.training.config import TrainConfig
from sae.training.recipes import recipe_named
from sae.training.step import Diverged
from store.activation_reader import ActivationReader
from store.activations import ActivationStore
from store.common import TRAIN, write_bytes, write_json

MEASURED = ("l0", "fvu", "ce_loss_score_zero", "ce_loss_score_mean", "delta_ce", "dead_share")
UNITS_MEASURED = ("l0", "fvu", "ce_loss_score_zero", "ce_loss_score_mean", "delta_ce")  # of the k largest units
DIVERGED = "diverged.json"
FLOAT32_BYTES = 4
UNKNOWN_FREE_BYTES = 2 * 10**9  # assumed where the system does not say how much memory is free


@dataclass(frozen=True)
class Point:
    """One run of a sweep; `name` is its directory."""

    name: str
    config: TrainConfig

    def in_memory_bytes(self, d_in: int) -> int:
        """Parameters, gradients and two moments of both matrices, and three batches of activations of a dense step."""
        return FLOAT32_BYTES * self.config.d_sae * (4 * 2 * d_in + 3 * self.config.batch_tokens)


def grid(
    out: Path, recipes: Sequence[str], d_sae: Sequence[int], l0: Sequence[float], seeds: Sequence[int], **settings: Any
) -> list[Point]:
    """Every combination, with its settings resolved. Raises: ValueError for a setting that a recipe does not have."""
    points = []
    for name, width, aim, seed in product(recipes, d_sae, l0, seeds):
        run = f"{name}-{width}-l0_{aim:g}-s{seed}"
        recipe, config = resolve_in(out / run, name, d_sae=width, target_l0=aim, seed=seed, **settings)
        if recipe.needs == "y":
            raise PipelineError(f"recipe {name} has another target than x, so it cannot be on a frontier of x̂.")
        if recipe.needs == "sites":
            raise PipelineError(
                f"recipe {name} reads several hook points or models, so it cannot be on a frontier of one hook point. "
                "Train it with sae train."
            )
        points.append(Point(run, config))
    if len({point.name for point in points}) != len(points):
        raise PipelineError("the sweep names a recipe, a size, an L0 or a seed twice.")
    return points


def sweep(
    store: str | Path,
    out: str | Path,
    *,
    recipes: Sequence[str],
    d_sae: Sequence[int] = (4096,),
    l0: Sequence[float] = (20.0,),
    seeds: Sequence[int] = (0,),
    tokens: int | None = None,
    config: dict[str, Any] | None = None,
    hook_point: str | None = None,
    kernels: str = "auto",
    device: str = "auto",
    max_ram_bytes: int | None = None,
    over_ranks: bool = False,
) -> Path | None:
    """Trains and evaluates a grid into `out`/<recipe>-<d_sae>-l0_<n>-s<seed>; returns the path of frontier.json.

    With `over_ranks` each of the processes that torchrun started takes whole runs, one in WORLD_SIZE, without waiting
    for the others: the last to finish writes the frontier, and the others return None.
    `config` overrides further settings of all recipes. Runs of one seed whose states fit into `max_ram_bytes` (default:
    half of the free memory) are trained in one pass over the rows, each bit for bit as if trained alone. Repeat the
    call to continue after an interruption: finished runs stay. A run that diverges is recorded with the reason
    (diverged.json, and in the frontier) and not repeated: to try it again, delete its directory.
    Raises: ValueError for wrong settings, before any work; Interrupted on Ctrl-C or SIGTERM.
    """
    out = Path(out)
    whole = ActivationStore.open(store)
    hook = hook_point_of(whole, hook_point)
    warn_of_few_rows(whole)
    settings = {"tokens": tokens or 4 * whole.totals(TRAIN, hook).kept_rows, **(config or {})}
    points = grid(out, recipes, d_sae, l0, seeds, **settings)
    acts = training_view(whole, hook, points[0].config)
    rank, world = rank_and_world() if over_ranks else (0, 1)
    own = points[rank::world]
    missing = [point for point in own if not _done(out / point.name)]
    memory = max_ram_bytes or _free_bytes() // 2
    with own_gpu(device):
        for group in _groups(missing, acts.hook_points[hook], memory // (ranks_here() if over_ranks else 1)):
            _train_group(acts, hook, out, group, kernels=kernels, device=device)
        _evaluate_all(acts, hook, out, own, kernels=kernels, device=device)
    if not all(_measured(out / point.name) for point in points):
        return None  # another process is at it
    return write_frontier(out, points, model=acts.provenance["model"]["id"], hook_point=hook)


def _train_group(
    store: ActivationReader, hook: str, out: Path, group: Sequence[Point], *, kernels: str, device: str
) -> None:
    """Trains the runs of a group in one pass over the rows that they share."""
    features = sum(point.config.d_sae for point in group)
    rows = rows_for(store, hook, group[0].config, None, device=device_named(device), d_sae=features)
    plans = [loop.Plan(out / p.name, p.config, provenance_of(store, hook, out / p.name)) for p in group]
    for plan, found in zip(plans, loop.train_together(rows, plans, kernels=kernels, device=device), strict=True):
        if isinstance(found, Diverged):
            write_json(plan.out / DIVERGED, {"reason": str(found)})


def _evaluate_all(store: ActivationReader, hook: str, out: Path, points: Sequence[Point], **how: Any) -> None:
    """Evaluates the runs that have no evaluation yet; refuses a directory that holds a run with other settings."""
    ablated: Ablated = {}
    for point in points:
        directory = out / point.name
        loop.bind_directory(directory, point.config, provenance_of(store, hook, directory))
        if not _measured(directory):
            evaluate(directory, ablated=ablated, **how)


def write_frontier(out: Path, points: Sequence[Point], *, model: str, hook_point: str) -> Path:
    """Writes frontier.json and frontier.svg of the runs in `out`, from their eval.json.

    `{"format": 1, "model", "hook_point", "runs": [{"id", "recipe", "d_sae", "target_l0", "seed", "rows", "lambda",
    "l0", "fvu", "ce_loss_score_zero", "ce_loss_score_mean", "delta_ce", "dead_share"}]}`; `id` is the directory, `rows`
    the number of rows trained on, `lambda` is in scaled units, and 0 if sparsity is set by k. A run that diverged has
    the reason in "diverged" and null for what was not measured. "units" has the baseline, the k largest of the layer's
    own units, once for each k = L0 of a run: `[{"k", "l0": how many of them are not 0, "fvu", …}]` by rising k; without
    the evaluations of version 0.1, which did not measure it.
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
    frontier = {
        "format": FRONTIER_FORMAT,
        "model": model,
        "hook_point": hook_point,
        "runs": runs,
        "units": _units(out / point.name for point in points),
    }
    write_bytes(out / "frontier.svg", picture(frontier).encode())
    write_json(out / "frontier.json", frontier)
    return out / "frontier.json"


def _outcome(directory: Path) -> dict[str, Any]:
    """The measurements of a run, or why it diverged."""
    if (directory / DIVERGED).is_file():
        reason = json.loads((directory / DIVERGED).read_text(encoding="utf-8"))["reason"]
        return {"diverged": reason, "lambda": None, **dict.fromkeys(MEASURED)}
    metrics = json.loads((directory / "eval.json").read_text(encoding="utf-8"))["metrics"]
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return {"lambda": config["lambda"]["scaled"], **{name: metrics.get(name, {}).get("value") for name in MEASURED}}


def _units(directories: Iterable[Path]) -> list[dict[str, Any]]:
    """The figures of the k largest units for each k that a run was compared with, by rising k."""
    found: dict[int, dict[str, Any]] = {}
    for path in (directory / "eval.json" for directory in directories):
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "units" in report:
            measured = report["metrics"]
            values = {name: measured.get(f"topk_units_{name}", {}).get("value") for name in UNITS_MEASURED}
            found[report["units"]["k"]] = {"k": report["units"]["k"], **values}
    return [found[k] for k in sorted(found)]


def _done(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.json", DIVERGED))  # written last


def _measured(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("eval.json", DIVERGED))


def _groups(points: Sequence[Point], d_in: int, max_bytes: int) -> Iterator[list[Point]]:
    """Runs that use the same rows in the same order, as many at once as fit into memory."""

    def same_rows(point: Point) -> tuple[int, int, str]:
        return point.config.seed, point.config.batch_tokens, recipe_named(point.config.recipe).needs

    for rows in dict.fromkeys(same_rows(point) for point in points):
        group: list[Point] = []
        for point in (p for p in points if same_rows(p) == rows):
            if group and sum(p.in_memory_bytes(d_in) for p in (*group, point)) > max_bytes:
                yield group
                group = []
            group.append(point)
        yield group


def _free_bytes() -> int:
    if not hasattr(os, "sysconf"):  # Windows
        return UNKNOWN_FREE_BYTES
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
