"""The kernels around a step with dense products: what it is told, Adam on stored gradients, and what it tells.

They follow the rule of every fixed-shape step: once a bit of `flags` is set, nothing changes.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_adam import moved
from sae.kernels.triton_step.learn import SILENT_FOR
from sae.kernels.triton_step.penalty import coefficient_now, keep_annealed, rates_now, search


@triton.jit
def begin(told, step, steps_done, coming_flags, flags, penalty, rates, rates_held):
    """The number of this step, and λ, p and the next p of it in `told`."""
    tl.atomic_or(flags, tl.load(coming_flags))
    tl.store(step, tl.load(steps_done))
    now = rates_now(rates, steps_done, rates_held)
    tl.store(told, coefficient_now(penalty, now))
    tl.store(told + 1, tl.load(now + 4))
    tl.store(told + 2, tl.load(now + 5))


@triton.jit
def take_losses(loss, error, before, after, losses, flags):
    """Whether the loss is finite is known before anything moves."""
    found = tl.load(loss)
    tl.store(losses, found)
    tl.store(losses + 1, tl.load(error))
    tl.store(losses + 2, tl.load(before))
    tl.store(losses + 3, tl.load(after))
    if not (tl.abs(found) < float("inf")):
        tl.atomic_or(flags, 1)


@triton.jit
def learn_numbers(
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    rates,
    step,
    flags,
    ratio,
    rest1,
    beta2,
    rest2,
    eps,
    n,
    rates_held,
    AT_LEAST_ZERO: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Adam's step on any shape, as one row of n numbers. Gradients become zero in any case."""
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    mask = place < n
    g = tl.load(gradient + place, mask=mask, other=0.0)
    tl.store(gradient + place, tl.full([NUMBERS], 0.0, tl.float32), mask=mask)
    if tl.load(flags) != 0:
        return
    now = rates_now(rates, step, rates_held)
    rate, correction = tl.load(now) * ratio, tl.load(now + 1)
    p = tl.load(parameter + place, mask=mask, other=0.0)
    p = moved(p, g, exp_avg, exp_avg_sq, place, mask, rate, rest1, beta2, rest2, correction, eps)
    if AT_LEAST_ZERO:
        p = tl.where(p < 0, 0.0, p)  # one that is not a number stays so
    tl.store(parameter + place, p, mask=mask)


@triton.jit
def learn_unit_rows(
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    rates,
    step,
    flags,
    rest1,
    beta2,
    rest2,
    eps,
    d,
    rates_held,
    COLUMNS: tl.constexpr,
):
    """The same for one row of unit norm: g ← g − (g·p) p, Adam's step, p ← p / ‖p‖."""
    column = tl.arange(0, COLUMNS)
    mask = column < d
    place = tl.program_id(0).to(tl.int64) * d + column
    g = tl.load(gradient + place, mask=mask, other=0.0)
    tl.store(gradient + place, tl.full([COLUMNS], 0.0, tl.float32), mask=mask)
    if tl.load(flags) != 0:
        return
    now = rates_now(rates, step, rates_held)
    rate, correction = tl.load(now), tl.load(now + 1)
    p = tl.load(parameter + place, mask=mask, other=0.0)
    g -= tl.sum(g * p, 0) * p
    p = moved(p, g, exp_avg, exp_avg_sq, place, mask, rate, rest1, beta2, rest2, correction, eps)
    norm = tl.sqrt(tl.sum(tl.where(mask, p * p, 0.0), 0))
    tl.store(parameter + place, p / tl.maximum(norm, 1e-12), mask=mask)


@triton.jit
def count_silence(
    silent,
    fired,
    b_enc,
    threshold,
    mean_threshold,
    flags,
    rows,
    rise,
    min_density,
    d_sae,
    REVIVES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """The rows since each feature fired. REVIVES: biases of silent JumpReLU features rise (`sae.training.revival`)."""
    if tl.load(flags) != 0:
        return
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    mask = feature < d_sae
    silence = tl.load(silent + feature, mask=mask, other=0) + rows
    silence = tl.where(tl.load(fired + feature, mask=mask, other=0) != 0, 0, silence)
    tl.store(silent + feature, silence, mask=mask)
    if REVIVES:
        unit = tl.maximum(tl.load(threshold + feature, mask=mask, other=0.0), tl.load(mean_threshold))
        raised = tl.where(silence.to(tl.float32) * min_density >= SILENT_FOR, tl.maximum(unit, 0.0) * rise, 0.0)
        tl.store(b_enc + feature, tl.load(b_enc + feature, mask=mask, other=0.0) + raised, mask=mask)


@triton.jit
def finish_dense(
    penalty,
    losses,
    active,
    log_target,
    search_start,
    search_stop,
    search_gain,
    rates,
    step,
    steps_done,
    flags,
    coming_flags,
    rows,
    most_entries,
    log,
    log_steps,
    rates_held,
    ANNEALS: tl.constexpr,
    SEARCHES: tl.constexpr,
):
    """λ, what is logged, and the number of steps done. With less than `most_entries` the next step is sparse."""
    if tl.load(flags) != 0:
        return
    at = tl.load(step)
    now = rates_now(rates, step, rates_held)
    if ANNEALS:
        keep_annealed(penalty, now, losses)
    if SEARCHES:
        search(penalty, now, active, at, rows, log_target, search_start, search_stop, search_gain)
    tl.store(log + 3 * (at % log_steps), tl.load(losses))
    tl.store(log + 3 * (at % log_steps) + 1, tl.load(losses + 1))
    tl.store(log + 3 * (at % log_steps) + 2, tl.load(active).to(tl.float32))
    tl.store(steps_done, at + 1)
    tl.store(coming_flags, tl.where(tl.load(active) < most_entries, 32, 0))
