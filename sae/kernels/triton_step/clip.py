"""The joint norm of all gradients, before anything moves, and the factor that clips it."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_step.by_feature import sums_of_entries
from sae.kernels.triton_step.learn import decoder_gradient


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
    penalty,
    rates,
    step,
    through_encoder,
    squares,
    flags,
    width,
    rows,
    d,
    d_sae,
    rates_held,
    PRE_BIAS: tl.constexpr,
    PENALTY: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The squares of the gradients of every n-th feature, summed, and what reaches b_dec through its encoder row."""
    if tl.load(flags) != 0:
        return
    column = tl.arange(0, COLUMNS)
    mask = column < d
    if PRE_BIAS:
        through = tl.full([COLUMNS], 0.0, tl.float32)
    total = 0.0
    for feature in range(tl.program_id(0), d_sae, tl.num_programs(0)):
        at = tl.cast(feature, tl.int64) * d + column
        first, n = tl.load(starts + feature), tl.load(counts + feature)
        g, d_b = sums_of_entries(entries, first, n, d_values, centred, column, mask, width, d, ENTRIES, COLUMNS)
        total += tl.sum(g * g, 0) + d_b * d_b
        if PRE_BIAS:
            through -= d_b * tl.load(w_enc + at, mask=mask, other=0.0)
        p = tl.load(w_dec + at, mask=mask, other=0.0)
        g = decoder_gradient(
            entries,
            first,
            n,
            values,
            gradient,
            p,
            penalty,
            rates,
            step,
            column,
            mask,
            width,
            rows,
            d,
            rates_held,
            PENALTY,
            ENTRIES,
            COLUMNS,
        )
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
