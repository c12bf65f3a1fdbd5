"""λ and the learning rate of a step, on the device: from a table of coming steps, and from L0 where λ is searched for.

`penalty` holds the numbers of `sae.training.sparsity_penalty.LambdaController` in float64: coefficient, mean L0,
response, annealing. `rates` has one row for each coming step: the learning rate over Adam's first correction, the
second correction, λ's warm-up, the same over that of the next step, the exponent p of Σ f^p, and that of the next step.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

RATE_COLUMNS: tl.constexpr = tl.constexpr(6)

# as in `sae.training.sparsity_penalty`
MEAN_L0_STEPS: tl.constexpr = tl.constexpr(10)
LEAD_STEPS: tl.constexpr = tl.constexpr(40)
RESPONSE: tl.constexpr = tl.constexpr(0.5)
LOG_LARGEST_RATIO: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def rates_now(rates, step, rates_held):
    """The row of this step."""
    return rates + (tl.load(step) % rates_held) * RATE_COLUMNS


@triton.jit
def coefficient_now(penalty, now):
    """λ of this step."""
    searched = tl.load(penalty) * tl.load(penalty + 2) * tl.load(penalty + 3)
    return (searched * tl.load(now + 2).to(tl.float64)).to(tl.float32)


@triton.jit
def keep_annealed(penalty, now, losses):
    """Rescales λ so that, with the exponent of the next step, the penalty of these activations stays the same."""
    before, after = tl.load(losses + 2).to(tl.float64), tl.load(losses + 3).to(tl.float64)
    falls = (tl.load(now + 5) < tl.load(now + 4)) & (after > 0)
    tl.store(penalty + 3, tl.load(penalty + 3) * tl.where(falls, before / tl.where(falls, after, 1.0), 1.0))


@triton.jit
def search(penalty, now, active, at, rows, log_target, start, stop, gain):
    """Moves λ towards the value that gives the target L0: `LambdaController._search`."""
    l0 = tl.load(active).to(tl.float64) / rows
    mean = tl.load(penalty + 1)
    before = tl.where(at > 0, mean, l0)
    mean += (l0 - mean) / tl.minimum(at + 1, MEAN_L0_STEPS)
    tl.store(penalty + 1, mean)
    found, earlier = tl.log(tl.maximum(mean, 1e-9)), tl.log(tl.maximum(before, 1e-9))
    off = found - log_target + (found - earlier) * LEAD_STEPS
    off = tl.minimum(tl.maximum(off, -LOG_LARGEST_RATIO), LOG_LARGEST_RATIO)
    coefficient = tl.load(penalty)
    coefficient *= tl.where((at < start) & (off < 0), tl.load(now + 3).to(tl.float64), 1.0)
    searching = (at < stop) & ((at >= start) | (off < 0))
    tl.store(penalty + 2, tl.where(searching, tl.exp(off * RESPONSE), 1.0))
    tl.store(penalty, coefficient * tl.where(searching, tl.exp(gain * off), 1.0))
