"""x̂ from the chosen entries, the loss, and the gradients of the loss with respect to x̂ and the entries' values."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_step.dead_select import spread, squares


@triton.jit
def explain(
    x,
    scale,
    w_dec,
    b_dec,
    features,
    values,
    kept,
    gradient,
    d_values,
    row_losses,
    prefix_ends,
    rates,
    step,
    flags,
    rows,
    d,
    width,
    rates_held,
    PREFIXES: tl.constexpr,
    PENALISED: tl.constexpr,
    ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of a row: `Σ over prefixes p of ‖x − x̂_p‖²`, the gradients, and the error of the last prefix (all features).

    x̂_p has the features before `prefix_ends[p]`. gradient[p] = Σ over q ≥ p of 2 (x̂_q − x) / rows is what reaches a
    feature of prefix p and not of p − 1; gradient[0] also reaches b_dec. Decoder rows are read once.
    PENALISED: the loss has λ Σ f, too.
    """
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, ROOM)
    there = j < tl.load(kept + row)
    feature = tl.load(features + row * width + j, mask=there, other=0)
    wide = feature.to(tl.int64)
    value = tl.load(values + row * width + j, mask=there, other=0.0)
    prefix = tl.full([ROOM], 0, tl.int32)
    for end in tl.static_range(PREFIXES - 1):
        prefix += (feature >= tl.load(prefix_ends + end)).to(tl.int32)
    d_value = tl.full([ROOM], 0.0, tl.float32)
    loss = 0.0
    last_error = 0.0
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = column < d
        tile = tl.load(w_dec + wide[:, None] * d + column[None, :], mask=there[:, None] & mask[None, :], other=0.0)
        target = tl.load(x + row * d + column, mask=mask, other=0.0) * scale
        bias = tl.load(b_dec + column, mask=mask, other=0.0)
        total = tl.full([COLUMNS], 0.0, tl.float32)
        for back in tl.static_range(PREFIXES):
            part = tl.where((prefix < PREFIXES - back)[:, None], value[:, None] * tile, 0.0)
            error = tl.sum(part, 0) + bias - target
            square = tl.sum(error * error, 0)
            loss += square
            if back == 0:
                last_error += square
            total += error * (2.0 / rows)
            tl.store(gradient + ((PREFIXES - 1 - back) * rows + row) * d + column, total, mask=mask)
            d_value += tl.where(prefix == PREFIXES - 1 - back, tl.sum(tile * total[None, :], 1), 0.0)
    if PENALISED:
        coefficient = tl.load(rates + 3 * (tl.load(step) % rates_held) + 2)
        loss += coefficient * tl.sum(tl.where(there, value, 0.0), 0)
        d_value += coefficient / rows
    tl.store(d_values + row * width + j, d_value, mask=there)
    tl.store(row_losses + row, loss)
    tl.store(row_losses + rows + row, last_error)


@triton.jit
def columns(
    gradient,
    sums,
    row_losses,
    losses,
    x,
    scale,
    residual,
    aux_parts,
    flags,
    rows,
    d,
    PREFIXES: tl.constexpr,
    AUX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The gradient of b_dec through x̂, and the loss: whether it is finite is known before anything moves.

    AUX: also V of the error and of the target, and the squares of what dead features leave of the error.
    """
    if tl.load(flags) != 0:
        return
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if AUX:
        inside = column < d
        last = gradient + tl.cast(PREFIXES - 1, tl.int64) * rows * d
        at = aux_parts + tl.program_id(0)
        tl.store(at, spread(last, rows * -0.5, column, inside, rows, d, ROWS, COLUMNS))
        tl.store(at + tl.num_programs(0), spread(x, scale, column, inside, rows, d, ROWS, COLUMNS))
        tl.store(at + 2 * tl.num_programs(0), squares(residual, column, inside, rows, d, ROWS, COLUMNS))
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < d)[None, :]
        total += tl.load(gradient + row.to(tl.int64)[:, None] * d + column[None, :], mask=mask, other=0.0)
    tl.store(sums + column, tl.sum(total, 0), mask=column < d)
    if tl.program_id(0) == 0:
        for number in tl.static_range(2):
            summed = tl.full([AT_ONCE], 0.0, tl.float32)
            for start in range(0, rows, AT_ONCE):
                row = start + tl.arange(0, AT_ONCE)
                summed += tl.load(row_losses + number * rows + row, mask=row < rows, other=0.0)
            mean = tl.sum(summed, 0) / rows
            tl.store(losses + number, mean)
            if not (tl.abs(mean) < float("inf")):
                tl.atomic_or(flags, 1)
