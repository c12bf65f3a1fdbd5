"""Adam on a GPU in one pass over memory, with the unit norm of decoder rows."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

FLAT_NUMBERS = 1024


@triton.jit
def moved(p, g, exp_avg, exp_avg_sq, place, mask, rate, rest1, beta2, rest2, correction, eps):
    """Stores the moments and returns the parameter after one step."""
    m = tl.load(exp_avg + place, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=mask, other=0.0)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    tl.store(exp_avg + place, m, mask=mask)
    tl.store(exp_avg_sq + place, v, mask=mask)
    return p - rate * m / (tl.sqrt(v) * correction + eps)


@triton.jit
def _adam_flat(
    parameter, gradient, exp_avg, exp_avg_sq, rate, rest1, beta2, rest2, correction, eps, n, NUMBERS: tl.constexpr
):
    """Any shape, as one row of n numbers. Reads four numbers for each parameter and writes three."""
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    mask = place < n
    p = tl.load(parameter + place, mask=mask, other=0.0)
    g = tl.load(gradient + place, mask=mask, other=0.0)
    p = moved(p, g, exp_avg, exp_avg_sq, place, mask, rate, rest1, beta2, rest2, correction, eps)
    tl.store(parameter + place, p, mask=mask)


@triton.jit
def _adam_unit_rows(
    parameter, gradient, exp_avg, exp_avg_sq, rate, rest1, beta2, rest2, correction, eps, d, COLUMNS: tl.constexpr
):
    """One row in registers: g ← g − (g·p) p, Adam's step, p ← p / ‖p‖. No more memory traffic than `_adam_flat`."""
    column = tl.arange(0, COLUMNS)
    mask = column < d
    place = tl.program_id(0).to(tl.int64) * d + column
    p = tl.load(parameter + place, mask=mask, other=0.0)
    g = tl.load(gradient + place, mask=mask, other=0.0)
    g -= tl.sum(g * p, 0) * p
    p = moved(p, g, exp_avg, exp_avg_sq, place, mask, rate, rest1, beta2, rest2, correction, eps)
    norm = tl.sqrt(tl.sum(tl.where(mask, p * p, 0.0), 0))
    tl.store(parameter + place, p / tl.maximum(norm, 1e-12), mask=mask)


def adam_(
    parameter: Float[Tensor, "n d"],
    gradient: Float[Tensor, "n d"],
    exp_avg: Float[Tensor, "n d"],
    exp_avg_sq: Float[Tensor, "n d"],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """`reference.adam_` in one pass over memory. All four tensors must be contiguous."""
    tensors = (parameter, gradient, exp_avg, exp_avg_sq)
    assert all(t.is_contiguous() for t in tensors)
    scalars = (lr / (1 - beta1**step), 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** -0.5, eps)
    n, d = parameter.shape
    if unit_rows:
        columns = triton.next_power_of_2(d)
        _adam_unit_rows[(n,)](*tensors, *scalars, d, COLUMNS=columns, num_warps=min(16, max(1, columns // 256)))
    else:
        grid = (triton.cdiv(n * d, FLAT_NUMBERS),)
        _adam_flat[grid](*tensors, *scalars, n * d, NUMBERS=FLAT_NUMBERS)
