"""One training step and one resampling event: functions from a state and a batch to the next state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels.activations import FeatureActs, l0
from sae.parallel.mesh import Mesh
from sae.training import losses
from sae.training.adam import learning_rate
from sae.training.batch_topk_threshold import CALIBRATION_ROWS, calibrated, update_thresholds_
from sae.training.config import TrainConfig
from sae.training.objectives import ScaledBatch, StepContext
from sae.training.recipes import Recipe, recipe_named
from sae.training.revival import raise_silent_biases_
from sae.training.rows import Batch, Rows
from sae.training.shard import own_features
from sae.training.state import TrainState

SPARSE_BELOW_DENSITY = 1 / 20  # at about this density the four sparse products cost as much as dense ones
SEED_STRIDE = 1_000_003  # between the random streams of neighbouring seeds, whose events draw different rows


class Diverged(ValueError):
    """The loss or the weights of a run are no longer finite, although its rows are; its last checkpoint is kept."""


# --- a step ----------------------------------------------------------------------------------------------------------


def train_step(state: TrainState, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """One step: the recipe's loss, backward, Adam, and what follows from the activations. Returns tensors to log.

    Raises: ValueError when the loss is not finite; nothing has changed then.
    """
    recipe = recipe_named(config.recipe)
    rows = scaled(state, batch, recipe)
    outcome = recipe.objective(state.sae, rows, _context(state, config))
    mesh = state.mesh
    if mesh.agree(~outcome.loss.isfinite()):
        rows_are_finite = not mesh.agree(~all_finite(part for part in batch[:3] if part is not None))
        _refuse(mesh.average(outcome.loss.detach()).item(), state.step + 1, config, rows_are_finite=rows_are_finite)
    torch.autograd.backward(outcome.loss)
    state.optimizer.step(learning_rate(state.step, config))
    active = _l0(outcome.acts, mesh)
    state.count_firings(outcome.acts)
    state.density = active.item() / config.d_sae
    if recipe.activation == "batchtopk":
        update_thresholds_(state.sae.threshold, state.sae.b_enc, outcome.acts, state.step, config, mesh)
    elif config.min_density:
        sae, n_rows = state.sae, outcome.acts.n_rows * mesh.row_groups
        raise_silent_biases_(sae.b_enc, sae.threshold, state.tokens_since_fired, n_rows, config.min_density, mesh)
    _keep_annealed_penalty(state, outcome.acts)
    state.penalty.update(active.item())
    state.step += 1
    return {"loss": outcome.loss.detach(), "error": outcome.error.detach(), "l0": active, "x": rows.target.detach()}


def _l0(acts: FeatureActs, mesh: Mesh) -> Tensor:
    """Active features per row of the whole batch; from integer counts, so that all ranks find the same number."""
    if mesh.world == 1:
        return l0(acts)
    return mesh.reduce(acts.n_active(), "sum", "world") / (acts.n_rows * mesh.row_groups)


def scaled(state: TrainState, batch: Batch, recipe: Recipe) -> ScaledBatch:
    """The batch on the state's device, in scaled units."""
    x = batch.x.to(state.device, non_blocking=True) * state.scale
    resid = None if batch.resid is None else batch.resid.to(state.device, non_blocking=True)
    if recipe.needs != "y":
        return ScaledBatch(x, x, resid)
    if batch.y is None:
        raise ValueError(f"recipe {recipe.name} learns y from x; these rows have no y. Name a target hook point.")
    return ScaledBatch(x, batch.y.to(state.device, non_blocking=True) * state.target_scale, resid)


def _context(state: TrainState, config: TrainConfig) -> StepContext:
    return StepContext(
        config,
        state.optimizer.kernels,
        state.penalty.value,
        sparse=state.density < SPARSE_BELOW_DENSITY,  # of the last step: a resumed run decides as an unbroken one
        dead=state.dead(config.dead_after_tokens),
        p=state.penalty.p,
        scale=state.scale,
        downstream=state.downstream,
        site_widths=tuple(site.width for site in state.sites),
        mesh=state.mesh,
    )


@torch.no_grad()
def _keep_annealed_penalty(state: TrainState, acts: FeatureActs) -> None:
    """Rescales λ so that, with the p of the next step, the penalty on these activations stays the same."""
    p, next_p = state.penalty.p, state.penalty.next_p
    if next_p < p:
        norms = torch.stack([losses.lp_norm(acts, p), losses.lp_norm(acts, next_p)])
        before, after = state.mesh.average(state.mesh.over_shards(norms)).tolist()
        state.penalty.keep_penalty(before, after)


def check_weights(state: TrainState, config: TrainConfig) -> None:
    """Raises: Diverged when a weight is not finite, which can happen while the loss still is finite."""
    if state.mesh.agree(~all_finite(state.sae.tensors().values())):
        _refuse(float("nan"), state.step, config, rows_are_finite=True)


def all_finite(weights: Iterable[Tensor]) -> Bool[Tensor, ""]:
    """Whether every number is finite.

    The smallest and the largest of a tensor show it: unlike `isfinite`, they need no memory as large as the weights.
    """
    in_order = (tensor if tensor.is_contiguous() else tensor.t() for tensor in weights if tensor.numel())
    return torch.stack([end for tensor in in_order for end in torch.aminmax(tensor)]).isfinite().all()


def _refuse(loss: float, step: int, config: TrainConfig, *, rows_are_finite: bool) -> None:
    cause = (
        f"lr = {config.lr:g} is too high"
        if rows_are_finite
        else "rows of this batch are not finite (`sae verify` the store)"
    )
    message = f"training: the loss is {loss} at step {step:,}. The last checkpoint is kept; likely cause: {cause}."
    raise Diverged(message) if rows_are_finite else ValueError(message)


def log_entry(metrics: dict[str, Tensor], state: TrainState, config: TrainConfig) -> dict[str, Any]:
    """A line of metrics.jsonl; fvu is relative to the batch's own variance (0 where all its rows are equal)."""
    x, average = metrics["x"], state.mesh.average
    variance = average((x - average(x.mean(0))).pow(2).sum(-1).mean())
    error, loss = average(metrics["error"]), average(metrics["loss"])
    entry = {
        "step": state.step,
        "rows": state.step * config.batch_tokens,
        "loss": loss.item(),
        "fvu": (error / variance).item() if variance > 0 else 0.0,
        "l0": metrics["l0"].item(),
        "dead_share": state.mesh.mean_of_features(state.dead(config.dead_after_tokens).float()).item(),
        "lr": learning_rate(state.step - 1, config),
    }
    if recipe_named(config.recipe).coefficient:
        entry["coefficient"] = state.penalty.value
    return entry


# --- the end of a run ------------------------------------------------------------------------------------------------


def calibrated_threshold(state: TrainState, rows: Rows, config: TrainConfig) -> Float[Tensor, " d_sae"]:
    """Batch-topk's thresholds in scaled units, calibrated on rows drawn from the seed: a resumed run finds the same."""
    sample = rows.sample(CALIBRATION_ROWS, config.seed * SEED_STRIDE + config.steps)
    return calibrated(state.sae, sample.to(state.device) * state.scale, config.min_density, state.mesh)


# --- resampling ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def resample_dead(state: TrainState, rows: Rows, config: TrainConfig, recipe: Recipe) -> list[dict[str, int]]:
    """Gives dead features a new start, as the recipe does; returns one line of resampled.jsonl for each.

    Their losses on a sample of rows decide which rows the features start from.
    """
    assert recipe.resample is not None
    mesh, n = state.mesh, config.d_sae
    dead = mesh.all_features(state.dead(config.resample_window_steps * config.batch_tokens), n).nonzero().squeeze(-1)
    if not len(dead):
        return []
    check_weights(state, config)
    seed = config.seed * SEED_STRIDE + state.step
    sample = rows.sample(config.resample_rows, seed) * state.scale
    l1 = state.penalty.value if recipe.coefficient == "l1" else 0.0
    chunks = torch.split(sample, config.batch_tokens)
    errors = torch.cat([_all_row_losses(state, chunk.to(state.device), l1).cpu() for chunk in chunks])
    generator = torch.Generator().manual_seed(seed)
    parents = recipe.resample(state.sae, state.optimizer, dead, sample, errors, generator)
    dead = dead[: len(parents)]
    ages = mesh.all_features(state.tokens_since_fired, n)[dead].tolist()
    state.tokens_since_fired[own_features(state.sae, dead)[1]] = 0
    state.resampled.append({"step": state.step, "features": len(dead)})
    return [
        {"step": state.step, "feature": feature, "parent_row": row, "silent_tokens": age}
        for feature, row, age in zip(dead.tolist(), parents.tolist(), ages, strict=True)
    ]


def _all_row_losses(state: TrainState, x: Float[Tensor, "rows d_in"], l1: float) -> Float[Tensor, " rows"]:
    return state.mesh.all_rows(_row_losses(state, state.mesh.own_rows(x), l1), len(x))


def _row_losses(state: TrainState, x: Float[Tensor, "rows d_in"], l1: float) -> Float[Tensor, " rows"]:
    """`‖x − x̂‖² + λ Σ f` of each row."""
    acts = state.sae.feature_acts(state.sae.gathered(x), state.optimizer.kernels).sparse()
    ones = x.new_ones(state.sae.d_sae, 1)
    total = state.mesh.scatter_sum(acts.decode(ones)).squeeze(-1)  # Σ f, summed in one order on every device
    return (x - state.sae.output(acts, x)).pow(2).sum(-1) + l1 * total
