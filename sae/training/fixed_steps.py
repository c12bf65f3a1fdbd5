"""Takes a run's steps in fixed shapes where they fit, and every other one by the general path.

The host launches steps without looking. From time to time `settle` asks the device how far it came: where it halted,
nothing has changed since, so that step is taken by `train_step` (which raises as it always does) and the ones after it
again. What is computed does not depend on when `settle` is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.kernels.triton_step import DEAD, DENSE, OVERRUN, SPARSE
from sae.kernels.triton_step.buffers import (
    LOG_STEPS,
    RATE_COLUMNS,
    RATES,
    Buffers,
    Constants,
    Learned,
    Sizes,
    dead_room_for,
)
from sae.training.adam import learning_rate
from sae.training.batch_topk_threshold import PATIENCE
from sae.training.config import TrainConfig
from sae.training.downstream_gradient import kl_gradient_
from sae.training.fixed_plan import PENALTIES, FixedPlan, room_for, sizes_of
from sae.training.recipes import recipe_named
from sae.training.rows import Batch
from sae.training.sparsity_penalty import exponent_at, search_constants
from sae.training.state import TrainState
from sae.training.step import SPARSE_BELOW_DENSITY, scaled, train_step

KEPT_NUMBERS = 2**28  # of launched batches, kept until they are known to be done: 1 GiB

Metrics = dict[str, Tensor]

if TYPE_CHECKING:  # the others need triton, which only a run that takes fixed steps has to have
    from sae.kernels.triton_step.step import FixedStep
    from sae.training.dense_step import DenseStep


class FixedSteps:
    """The steps of one run. Between two calls of `settle`, `state.step` counts steps that may not have been done."""

    def __init__(
        self,
        state: TrainState,
        config: TrainConfig,
        capture: Callable[[FixedStep | DenseStep], Callable[[], None]] | None = None,
    ) -> None:
        assert state.fixed_plan is not None
        from sae.kernels.triton_step.graph import captured

        self.state, self.config, self.capture = state, config, capture or captured
        self.plan: FixedPlan = state.fixed_plan
        self.penalised = recipe_named(config.recipe).objective in PENALTIES
        self.settled = state.step  # steps known to be done
        self.rates_from = -RATES
        self.launched: list[Batch] = []  # of the steps not yet known to be done
        self.resid: Tensor | None = None  # of the batch that is launched, for the rest of the model
        self.metrics: Metrics = {}  # of the last step that is known to be done
        self._dense = False  # whether the next step is for dense products
        self._made: FixedStep | DenseStep | None = None
        self._replay: Callable[[], None] = lambda: None
        self._stale = True

    def take(self, batch: Batch) -> None:
        """Takes the next step, or launches it."""
        if not self._fits(batch):
            self.settle()
            self.metrics = train_step(self.state, batch, self.config)
            self.settled, self._stale = self.state.step, True
            return
        self._launch(batch)
        if len(self.launched) >= min(LOG_STEPS, KEPT_NUMBERS // _numbers(batch)):
            self.settle()

    def _fits(self, batch: Batch) -> bool:
        """Whether the next step can be tried in fixed shapes: decided by the steps before it, never by the time."""
        if self.penalised and not self.launched:
            entries = round(self.state.density * self.config.batch_tokens * self.config.d_sae)
            dense = entries >= _most_entries(self.config)
            if dense and recipe_named(self.config.recipe).needs:
                return False
            if dense != self._dense:
                self._dense, self._made = dense, None  # the memory of one is free for the other
            if not dense:
                self.plan.room = self.plan.room or room_for(self.state.density * self.config.d_sae)
        waiting = self.state.step < self.plan.resume_at
        return (self._dense or self.plan.room > 0) and not waiting and len(batch.x) == self.config.batch_tokens

    def settle(self) -> Metrics:
        """Waits for the launched steps, takes again what was not done, and returns the figures of the last step.

        Raises: what `train_step` raises for a step that cannot be done at all.
        """
        while self.launched:
            again, flags = self._find_out()
            self._make_room(flags, halted=bool(again and flags & ~(DENSE | SPARSE | DEAD)))
            for batch in again:
                self.take(batch)
        return self.metrics

    def _make_room(self, flags: int, *, halted: bool) -> None:
        """Room for as many dead features as there are now; a step that halted for another reason is a general one."""
        sizes = self.made.sizes
        if flags & DEAD:
            self.plan.dead_room = dead_room_for(int(self.state.dead(self.config.dead_after_tokens).sum()))
        if halted:
            self.plan.halted(self.state.step, sizes, overrun=bool(flags & OVERRUN))
        if (self.plan.room, self.plan.dead_room) != (sizes.room, sizes.dead_room):
            self._made = None

    def weights_changed(self) -> None:
        """Must be called after anything else has changed the dictionary, such as resampling."""
        assert self.settled == self.state.step
        self._stale = True

    @property
    def made(self) -> FixedStep | DenseStep:
        """The step with its buffers, made when it is first needed."""
        if self._made is None:
            if self._dense:
                self._made = dense_step_of(self.state, self.config)
            else:
                outside = self._run_the_model if self.state.downstream is not None else None
                self._made = fixed_step_of(self.state, self.config, outside)
            self._replay = self.capture(self._made)
            self._stale, self.rates_from = True, -RATES
        return self._made

    def _run_the_model(self, held: Buffers) -> None:
        """From x̂ to its gradient, where the rest of the model is between them."""
        downstream, scale = self.state.downstream, self.state.scale
        assert downstream is not None
        assert self.resid is not None
        kl_gradient_(held.x * scale, held.x_hat, self.resid, downstream, scale, held.gradient[0], held.row_losses[0])

    def _launch(self, batch: Batch) -> None:
        held, step = self.made.buffers, self.state.step
        if self._stale:
            self.made.renew()
            held.steps_done.fill_(step)
            held.penalty.copy_(torch.tensor(list(self.state.penalty.saved().values()), dtype=torch.float64))
            self._stale = False
        if not self.rates_from <= step < self.rates_from + RATES:
            held.rates.copy_(coming_rates(step, self.config, self.state), non_blocking=True)
            self.rates_from = step
        held.x.copy_(batch.x, non_blocking=True)
        if isinstance(held, Buffers) and batch.y is not None and self.made.sizes.target_width:
            held.y.copy_(batch.y, non_blocking=True)
        self.resid = None if batch.resid is None else batch.resid.to(self.state.device, non_blocking=True)
        self._replay()
        self.launched.append(batch)
        self.state.step += 1

    def _find_out(self) -> tuple[list[Batch], int]:
        """Brings the state to the last step that was done; returns the batches of the others, and all flags."""
        held, state, launched = self.made.buffers, self.state, self.launched
        done, flags, coming = torch.cat([held.steps_done, held.flags, held.coming_flags]).tolist()
        finished = done - self.settled
        if finished:
            active = held.log[(done - 1) % LOG_STEPS, 2].item() / self.config.batch_tokens
            state.density = active / state.sae.d_sae
            state.penalty.move_to(done, held.penalty.tolist())
            self.metrics = self._logged(done - 1, launched[finished - 1])
        self.launched = []
        self._stale = self._stale or bool(flags or coming)
        self.settled = state.step = state.optimizer.step_count = done
        return launched[finished:], flags | coming

    def _logged(self, step: int, batch: Batch) -> Metrics:
        loss, error, entries = self.made.buffers.log[step % LOG_STEPS].clone()
        target = scaled(self.state, batch, recipe_named(self.config.recipe)).target
        return {"loss": loss, "error": error, "l0": entries / self.config.batch_tokens, "x": target}


def _numbers(batch: Batch) -> int:
    return sum(part.numel() for part in (batch.x, batch.y, batch.resid) if part is not None)


def fixed_step_of(
    state: TrainState, config: TrainConfig, outside: Callable[[Buffers], None] | None = None
) -> FixedStep:
    """The kernels' view of a run; `outside` computes the loss where they do not."""
    from sae.kernels.triton_step.step import FixedStep

    recipe, adam, sae = recipe_named(config.recipe), state.optimizer, state.sae
    moments = {name: (m["exp_avg"], m["exp_avg_sq"]) for name, m in adam.moments.items()}
    moments["W_enc"] = (moments["W_enc"][0].t(), moments["W_enc"][1].t())
    own = {"batchtopk": "threshold", "jumprelu": "threshold", "gated": "r_mag"}.get(recipe.activation)
    learned = Learned(
        sae.W_enc.detach().t(),
        sae.b_enc.detach(),
        sae.W_dec.detach(),
        sae.b_dec.detach(),
        moments,
        state.tokens_since_fired,
        getattr(sae, own).detach() if own else None,
        sae.b_mag.detach() if recipe.activation == "gated" else None,
        sae.W_skip.detach() if sae.skip else None,
    )
    return FixedStep(_sizes(state, config), _constants(state, config), learned, outside)


def dense_step_of(state: TrainState, config: TrainConfig) -> DenseStep:
    """The step of a run whose activations are not sparse yet."""
    from sae.training.dense_step import DenseStep

    return DenseStep(state, config, _sizes(state, config), _constants(state, config))


def _sizes(state: TrainState, config: TrainConfig) -> Sizes:
    assert state.fixed_plan is not None
    return sizes_of(state.fixed_plan, recipe_named(config.recipe), config, state.sae, state.sites)


def _constants(state: TrainState, config: TrainConfig) -> Constants:
    recipe, adam = recipe_named(config.recipe), state.optimizer
    return Constants(
        state.scale,
        adam.beta1,
        adam.beta2,
        adam.eps,
        adam.unit_norm,
        config.dead_after_tokens if config.aux_coefficient else 0,
        config.aux_coefficient,
        config.min_density,
        PATIENCE,
        _most_entries(config) if recipe.objective in PENALTIES else 2**31 - 1,
        recipe.pre_bias,
        state.target_scale,
        config.clip,
        config.bandwidth,
        config.threshold_lr_ratio,
        search_constants(config) if state.penalty.searches else None,
    )


def _most_entries(config: TrainConfig) -> int:
    """The entries of a batch from which on dense products are faster."""
    return math.ceil(SPARSE_BELOW_DENSITY * config.batch_tokens * config.d_sae)


def coming_rates(first: int, config: TrainConfig, state: TrainState) -> Tensor:
    """For RATES steps from `first` on, each at its number modulo RATES: a row of `sae.kernels.triton_step.penalty`."""
    beta1, beta2 = state.optimizer.beta1, state.optimizer.beta2
    warmup, rates = state.penalty.warmup, torch.zeros(RATES, RATE_COLUMNS, pin_memory=state.device.type == "cuda")
    for step in range(first, min(first + RATES, config.steps)):
        rate = learning_rate(step, config) / (1 - beta1 ** (step + 1))
        correction, rise = (1 - beta2 ** (step + 1)) ** -0.5, warmup(step) / warmup(step + 1)
        powers = exponent_at(step, config), exponent_at(step + 1, config)
        rates[step % RATES] = torch.tensor([rate, correction, warmup(step), rise, *powers])
    return rates
