"""Where the loss of x̂ is computed outside of the step, as end-to-end training does: x̂, and back from its gradient."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_step.penalty import coefficient_now, rates_now


@triton.jit
def reconstruct(
    target,
    scale,
    w_dec,
    b_dec,
    features,
    values,
    kept,
    x_hat,
    row_losses,
    flags,
    rows,
    d,
    width,
    ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x̂ of a row, and its squared error."""
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, ROOM)
    there = j < tl.load(kept + row)
    wide = tl.load(features + row * width + j, mask=there, other=0).to(tl.int64)
    value = tl.load(values + row * width + j, mask=there, other=0.0)
    error = 0.0
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = column < d
        tile = tl.load(w_dec + wide[:, None] * d + column[None, :], mask=there[:, None] & mask[None, :], other=0.0)
        found = tl.sum(value[:, None] * tile, 0) + tl.load(b_dec + column, mask=mask, other=0.0)
        off = found - tl.load(target + row * d + column, mask=mask, other=0.0) * scale
        error += tl.sum(tl.where(mask, off * off, 0.0), 0)
        tl.store(x_hat + row * d + column, found, mask=mask)
    tl.store(row_losses + rows + row, error)


@triton.jit
def pass_back(
    w_dec,
    features,
    values,
    kept,
    gradient,
    d_values,
    row_losses,
    penalty,
    rates,
    step,
    flags,
    rows,
    d,
    width,
    rates_held,
    ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of a row's entries from that of its x̂, and both with λ Σ f; its loss then has λ Σ f, too."""
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, ROOM)
    there = j < tl.load(kept + row)
    wide = tl.load(features + row * width + j, mask=there, other=0).to(tl.int64)
    value = tl.load(values + row * width + j, mask=there, other=0.0)
    coefficient = coefficient_now(penalty, rates_now(rates, step, rates_held))
    d_value = tl.full([ROOM], 0.0, tl.float32) + coefficient / rows
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = column < d
        tile = tl.load(w_dec + wide[:, None] * d + column[None, :], mask=there[:, None] & mask[None, :], other=0.0)
        g = tl.load(gradient + row * d + column, mask=mask, other=0.0)
        d_value += tl.sum(tile * g[None, :], 1)
    tl.store(d_values + row * width + j, d_value, mask=there)
    tl.store(row_losses + row, tl.load(row_losses + row) + coefficient * tl.sum(value, 0))
