"""x̂ from the chosen entries, the loss, and the gradients of the loss with respect to x̂ and the entries' values."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_step.dead_select import spread, squares
from sae.kernels.triton_step.penalty import coefficient_now, rates_now

LP_EPSILON: tl.constexpr = tl.constexpr(1e-2)  # as in `sae.training.losses`
LOG2_LP_EPSILON: tl.constexpr = tl.constexpr(-6.643856189774724)


@triton.jit
def explain(
    target,
    scale,
    w_dec,
    bias,
    bias_stride,
    features,
    values,
    kept,
    gradient,
    d_values,
    row_losses,
    prefix_ends,
    norms,
    pre_activations,
    own,
    d_own,
    active,
    penalty,
    rates,
    step,
    flags,
    bandwidth,
    rows,
    d,
    width,
    rates_held,
    PREFIXES: tl.constexpr,
    PENALTY: tl.constexpr,
    SITES: tl.constexpr,
    ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of a row: `Σ over prefixes p of ‖y − x̂_p‖²`, the gradients, and the error of the last prefix (all features).

    y, the target, is x but for transcoders. x̂ begins with `bias`: b_dec, or with a stride of d each row's own.
    x̂_p has the features before `prefix_ends[p]`. gradient[p] = Σ over q ≥ p of 2 (x̂_q − y) / rows is what reaches a
    feature of prefix p and not of p − 1; gradient[0] also reaches b_dec. Decoder rows are read once.
    PENALTY adds λ times `Σ f` ("l1"), `Σ f Σ_s ‖d^s‖` ("norms"), `Σ (f + ε)^p − ε^p` ("powers"), L0 ("jumps") or `Σ π`
    ("gates", which adds `‖x − x̂_frozen(π)‖²`, too). d_values are the gradients of pre-activations, `d_own` those of
    thresholds and of b_mag.
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
    if PENALTY == "gates":
        gate = tl.load(pre_activations + row * width + j, mask=there, other=0.0)
        d_gate = tl.full([ROOM], 0.0, tl.float32)
    d_value = tl.full([ROOM], 0.0, tl.float32)
    loss = 0.0
    last_error = 0.0
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = column < d
        tile = tl.load(w_dec + wide[:, None] * d + column[None, :], mask=there[:, None] & mask[None, :], other=0.0)
        wanted = tl.load(target + row * d + column, mask=mask, other=0.0) * scale
        given = tl.load(bias + row * bias_stride + column, mask=mask, other=0.0)
        total = tl.full([COLUMNS], 0.0, tl.float32)
        for back in tl.static_range(PREFIXES):
            part = tl.where((prefix < PREFIXES - back)[:, None], value[:, None] * tile, 0.0)
            error = tl.sum(part, 0) + given - wanted
            square = tl.sum(error * error, 0)
            loss += square
            if back == 0:
                last_error += square
            total += error * (2.0 / rows)
            tl.store(gradient + ((PREFIXES - 1 - back) * rows + row) * d + column, total, mask=mask)
            d_value += tl.where(prefix == PREFIXES - 1 - back, tl.sum(tile * total[None, :], 1), 0.0)
        if PENALTY == "gates":
            error = tl.sum(gate[:, None] * tile, 0) + given - wanted
            loss += tl.sum(error * error, 0)
            d_gate += tl.sum(tile * (error * (2.0 / rows))[None, :], 1)
    if PENALTY != "":
        now = rates_now(rates, step, rates_held)
        coefficient = coefficient_now(penalty, now)
    if PENALTY == "l1":
        loss += coefficient * tl.sum(value, 0)
        d_value += coefficient / rows
    if PENALTY == "norms":
        norm = tl.full([ROOM], 0.0, tl.float32)
        for site in tl.static_range(SITES):
            norm += tl.load(norms + wide * SITES + site, mask=there, other=0.0)
        loss += coefficient * tl.sum(value * norm, 0)
        d_value += coefficient / rows * norm
    if PENALTY == "powers":
        p, next_p = tl.load(now + 4), tl.load(now + 5)
        log_value = tl.log2(value + LP_EPSILON)
        power = tl.exp2(p * log_value)
        before = tl.sum(tl.where(there, power - tl.exp2(p * LOG2_LP_EPSILON), 0.0), 0)
        after = tl.exp2(next_p * log_value) - tl.exp2(next_p * LOG2_LP_EPSILON)
        loss += coefficient * before
        d_value += coefficient / rows * p * power / (value + LP_EPSILON)
        tl.store(row_losses + 2 * rows + row, before)
        tl.store(row_losses + 3 * rows + row, tl.sum(tl.where(there, after, 0.0), 0))
    if PENALTY == "jumps":
        pre = tl.load(pre_activations + row * width + j, mask=there, other=0.0)
        bar = tl.load(own + feature, mask=there, other=0.0)
        slope = tl.where(tl.abs(pre - bar) < bandwidth / 2, 1.0 / bandwidth, 0.0)
        tl.store(d_own + row * width + j, -slope * (bar * d_value + coefficient / rows), mask=there)
        d_value = tl.where(value > 0, d_value, 0.0)
        loss += coefficient * tl.sum((value > 0).to(tl.float32), 0)
    if PENALTY == "gates":
        loss += coefficient * tl.sum(gate, 0)
        d_value = tl.where(value > 0, d_value, 0.0)
        tl.store(d_own + row * width + j, d_value, mask=there)
        d_value = d_value * tl.exp(tl.load(own + feature, mask=there, other=0.0)) + d_gate + coefficient / rows
    if (PENALTY == "jumps") | (PENALTY == "gates"):
        tl.atomic_add(active, tl.sum((value > 0).to(tl.int32), 0))
    tl.store(d_values + row * width + j, d_value, mask=there)
    tl.store(row_losses + row, loss)
    tl.store(row_losses + rows + row, last_error)


@triton.jit
def columns(
    gradient,
    sums,
    row_losses,
    losses,
    target,
    scale,
    residual,
    aux_parts,
    flags,
    rows,
    d,
    PREFIXES: tl.constexpr,
    NUMBERS: tl.constexpr,
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
        tl.store(at + tl.num_programs(0), spread(target, scale, column, inside, rows, d, ROWS, COLUMNS))
        tl.store(at + 2 * tl.num_programs(0), squares(residual, column, inside, rows, d, ROWS, COLUMNS))
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < d)[None, :]
        total += tl.load(gradient + row.to(tl.int64)[:, None] * d + column[None, :], mask=mask, other=0.0)
    tl.store(sums + column, tl.sum(total, 0), mask=column < d)
    if tl.program_id(0) == 0:
        for number in tl.static_range(NUMBERS):
            summed = tl.full([AT_ONCE], 0.0, tl.float32)
            for start in range(0, rows, AT_ONCE):
                row = start + tl.arange(0, AT_ONCE)
                summed += tl.load(row_losses + number * rows + row, mask=row < rows, other=0.0)
            mean = tl.sum(summed, 0) / rows
            tl.store(losses + number, mean)
            if not (tl.abs(mean) < float("inf")):
                tl.atomic_or(flags, 1)
