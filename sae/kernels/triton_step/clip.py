"""The joint norm of all gradients, before anything moves, and the factor that clips it."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_step.learn import decoder_gradient, encoder_gradient


@triton.jit
def measure(
    w_enc,
    w_dec,
    centred,
    gradient,
    values,
    d_values,
    entries,
    starts,
    counts,
    prefix_ends,
    norms,
    site_of,
    slots,
    dead_gradients_dec,
    dead_gradients_enc,
    dead_d_b,
    aux_factor,
    own_gradients,
    bias_less,
    penalty,
    rates,
    step,
    through_encoder,
    squares,
    flags,
    skip_gradient,
    width,
    rows,
    d,
    d_out,
    d_sae,
    rates_held,
    PRE_BIAS: tl.constexpr,
    AUX: tl.constexpr,
    PENALTY: tl.constexpr,
    SITES: tl.constexpr,
    PREFIXES: tl.constexpr,
    SKIP: tl.constexpr,
    COLUMNS_OUT: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The squares of the gradients of every n-th feature, summed, and what reaches b_dec through its encoder row.

    Also those of what jumps and gates have of their own; SKIP: and the squares of every n-th row of W_skip's gradient.
    """
    if tl.load(flags) != 0:
        return
    column = tl.arange(0, COLUMNS)
    mask = column < d
    column_out = tl.arange(0, COLUMNS_OUT)
    mask_out = column_out < d_out
    if PRE_BIAS:
        through = tl.full([COLUMNS], 0.0, tl.float32)
    total = 0.0
    for feature in range(tl.program_id(0), d_sae, tl.num_programs(0)):
        wide = tl.cast(feature, tl.int64)
        g, d_b = encoder_gradient(
            wide,
            entries,
            starts,
            counts,
            d_values,
            centred,
            slots,
            dead_gradients_enc,
            dead_d_b,
            aux_factor,
            column,
            mask,
            width,
            d,
            AUX,
            ENTRIES,
            COLUMNS,
        )
        if PRE_BIAS:
            through -= d_b * tl.load(w_enc + wide * d + column, mask=mask, other=0.0)
        if PENALTY == "gates":
            d_b -= tl.load(bias_less + feature)
        total += tl.sum(g * g, 0) + d_b * d_b
        p = tl.load(w_dec + wide * d_out + column_out, mask=mask_out, other=0.0)
        g = decoder_gradient(
            wide,
            p,
            entries,
            starts,
            counts,
            values,
            gradient,
            prefix_ends,
            norms,
            site_of,
            slots,
            dead_gradients_dec,
            aux_factor,
            penalty,
            rates,
            step,
            column_out,
            mask_out,
            width,
            rows,
            d_out,
            rates_held,
            AUX,
            PENALTY,
            SITES,
            PREFIXES,
            ENTRIES,
            COLUMNS_OUT,
        )
        total += tl.sum(g * g, 0)
    if (PENALTY == "jumps") | (PENALTY == "gates"):
        for start in range(tl.program_id(0) * COLUMNS, 2 * d_sae, tl.num_programs(0) * COLUMNS):
            place = start + column
            g = tl.load(own_gradients + place, mask=place < 2 * d_sae, other=0.0)
            total += tl.sum(g * g, 0)
    if SKIP:
        for row in range(tl.program_id(0), d, tl.num_programs(0)):
            place = tl.cast(row, tl.int64) * d_out + column_out
            g = tl.load(skip_gradient + place, mask=mask_out, other=0.0)
            total += tl.sum(g * g, 0)
    if PRE_BIAS:
        tl.store(through_encoder + tl.program_id(0) * d + column, through, mask=mask)
    tl.store(squares + tl.program_id(0), total)


@triton.jit
def clip_factor(
    squares,
    sums,
    through_encoder,
    factor,
    flags,
    most,
    parts,
    d,
    PRE_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`min(1, most / (norm + 1e-6))`, as torch clips."""
    if tl.load(flags) != 0:
        return
    total = 0.0
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.sum(tl.load(squares + part, mask=part < parts, other=0.0), 0)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        g = tl.load(sums + column, mask=column < d, other=0.0)
        if PRE_BIAS:
            for start in range(0, parts, PARTS):
                part = start + tl.arange(0, PARTS)
                place = through_encoder + part[:, None] * d + column[None, :]
                inside = (part < parts)[:, None] & (column < d)[None, :]
                g += tl.sum(tl.load(place, mask=inside, other=0.0), 0)
        total += tl.sum(g * g, 0)
    tl.store(factor, tl.minimum(most / (tl.sqrt(total) + 1e-6), 1.0))
