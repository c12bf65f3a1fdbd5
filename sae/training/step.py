"""One training step and one resampling event: functions from a state and a batch to the next state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae.kernels.activations import FeatureActs, l0
from sae.training import adam, batch_topk_threshold, losses, resample, sparsity_penalty
from sae.training.config import TrainConfig
from sae.training.objectives import Now, Scaled
from sae.training.recipes import Recipe, recipe_named
from sae.training.rows import Batch, Rows
from sae.training.state import TrainState

SPARSE_BELOW_DENSITY = 1 / 20  # about where the four sparse products cost what dense ones do


class Diverged(ValueError):
    """The loss or the weights of a run are not finite, though its rows are; its last checkpoint is kept."""


# --- a step ----------------------------------------------------------------------------------------------------------


def train_step(state: TrainState, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """One step: the recipe's loss, backward, Adam under its constraints, counters. Returns tensors to log.

    Raises: ValueError when the loss is not finite; nothing has moved then.
    """
    recipe = recipe_named(config.recipe)
    x = batch.x.to(state.device, non_blocking=True) * state.scale
    scaled = Scaled(x, x, None if batch.resid is None else batch.resid.to(state.device))
    if recipe.needs == "y":
        scaled = scaled._replace(target=_required(batch.y, recipe).to(state.device) * state.target_scale)
    now = _now(state, config, recipe)
    outcome = recipe.objective(state.sae, scaled, now)
    _check_loss(outcome.loss, batch, state, config)
    outcome.loss.backward()
    state.optimizer.step(adam.learning_rate(state.step, config))
    acts = outcome.acts
    active = l0(acts)
    state.density = active.item() / state.sae.d_sae
    state.tokens_since_fired += len(scaled.x)
    state.tokens_since_fired[acts.fired()] = 0
    if recipe.activation == "batchtopk":
        batch_topk_threshold.settle_(state.sae.threshold, state.sae.b_enc, acts, state.step, config)
    if recipe.coefficient:
        sparsity_penalty.search_(state.penalty, active.item(), state.step, config)
    if config.p_end < 1:
        _hold_penalty(state, acts, config)
    state.step += 1
    return {"loss": outcome.loss.detach(), "error": outcome.error.detach(), "l0": active, "x": scaled.target.detach()}


def _now(state: TrainState, config: TrainConfig, recipe: Recipe) -> Now:
    return Now(
        config,
        state.optimizer.kernels,
        sparsity_penalty.coefficient_at(state.penalty, state.step, config) if recipe.coefficient else 0.0,
        # By the last step's density, so that a resumed run does as the unbroken one.
        sparse=state.density < SPARSE_BELOW_DENSITY,
        dead=state.tokens_since_fired >= config.dead_after_tokens,
        p=sparsity_penalty.p_at(state.step, config),
        scale=state.scale,
        downstream=state.downstream,
    )


def _required(y: Tensor | None, recipe: Recipe) -> Tensor:
    if y is None:
        raise ValueError(f"recipe {recipe.name} learns y from x; these rows have no y. Name a target hook point.")
    return y


@torch.no_grad()
def _hold_penalty(state: TrainState, acts: FeatureActs, config: TrainConfig) -> None:
    """Rescales λ so that the next step's Σ f^p weighs on this batch what this step's did.

    Source: Karvonen et al. 2024 (arXiv 2408.00113), which does so over ten batches at each of some changes of p.
    """
    p, p_next = sparsity_penalty.p_at(state.step, config), sparsity_penalty.p_at(state.step + 1, config)
    if p_next < p:
        after = losses.lp_norm(acts, p_next).item()
        if after > 0:
            state.penalty.annealing *= losses.lp_norm(acts, p).item() / after


def _check_loss(loss: Tensor, batch: Batch, state: TrainState, config: TrainConfig) -> None:
    """Stops a run that has gone wrong before anything moves."""
    if not loss.isfinite():
        _refuse(loss.item(), state.step + 1, config, rows_are_finite=bool(batch.x.isfinite().all()))


def _check_weights(state: TrainState, config: TrainConfig) -> None:
    """Weights can overflow while the loss still does not: checked before anything is logged or saved."""
    if not all(tensor.isfinite().all() for tensor in state.sae.tensors().values()):
        _refuse(float("nan"), state.step, config, rows_are_finite=True)


def _refuse(loss: float, step: int, config: TrainConfig, *, rows_are_finite: bool) -> None:
    cause = (
        f"lr = {config.lr:g} is too high"
        if rows_are_finite
        else "rows of this batch are not finite (`sae verify` the store)"
    )
    said = f"training: the loss is {loss} at step {step:,}. The last checkpoint is kept; likely cause: {cause}."
    raise Diverged(said) if rows_are_finite else ValueError(said)


def _measured(metrics: dict[str, Tensor], state: TrainState, config: TrainConfig) -> dict[str, Any]:
    """The logged line; fvu is relative to the batch's own variance (0 where all its rows are equal)."""
    x = metrics["x"]
    variance = (x - x.mean(0)).pow(2).sum(-1).mean()
    entry = {
        "step": state.step,
        "rows": state.step * config.batch_tokens,
        "loss": metrics["loss"].item(),
        "fvu": (metrics["error"] / variance).item() if variance > 0 else 0.0,
        "l0": metrics["l0"].item(),
        "dead_share": (state.tokens_since_fired >= config.dead_after_tokens).float().mean().item(),
        "lr": adam.learning_rate(state.step - 1, config),
    }
    if recipe_named(config.recipe).coefficient:
        entry["coefficient"] = sparsity_penalty.coefficient_at(state.penalty, state.step, config)
    return entry


# --- resampling ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _resample(state: TrainState, rows: Rows, config: TrainConfig, recipe: Recipe) -> dict[str, Any] | None:
    """The paper's resampling event; what was done is kept per feature for the log."""
    window_tokens = config.resample_window_steps * config.batch_tokens
    dead = (state.tokens_since_fired >= window_tokens).nonzero().squeeze(-1)
    if not len(dead):
        return None
    _check_weights(state, config)
    seed = config.seed * 1_000_003 + state.step
    sample = rows.sample(config.resample_rows, seed) * state.scale
    # λ of Σ f in this loss, where the recipe has one
    l1 = _now(state, config, recipe).coefficient if recipe.coefficient == "l1" else 0.0
    chunks = sample.split(config.batch_tokens)
    errors = torch.cat([_row_losses(state, chunk.to(state.device), l1).cpu() for chunk in chunks])
    generator = torch.Generator().manual_seed(seed)
    restart = resample.reseed_ if recipe.resample == "rank" else resample.resample_
    parents = restart(state.sae, state.optimizer, dead, sample, errors, generator)
    dead = dead[: len(parents)]
    ages = state.tokens_since_fired[dead].tolist()
    state.tokens_since_fired[dead] = 0
    state.resampled.append({"step": state.step, "features": len(dead)})
    return {"step": state.step, "features": dead.tolist(), "sample_rows": parents.tolist(), "silent_tokens": ages}


def _row_losses(state: TrainState, x: Tensor, l1: float) -> Tensor:
    acts = state.sae.feature_acts(x, state.optimizer.kernels).sparse()
    total = acts.decode(x.new_ones(state.sae.d_sae, 1)).squeeze(-1)  # Σ f, in one order on every device
    return (x - state.sae.output(acts, x)).pow(2).sum(-1) + l1 * total
