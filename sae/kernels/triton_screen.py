"""Which features can be active: the encoder's product in float16, and a bound on its rounding errors.

Tensor cores multiply float16 about fifteen times as fast as float32, so the dense product only screens: a feature that
cannot reach its row's bar within the bound cannot be active (`screening_bound.md`). The result is one bit per
(row, feature); `triton_select` computes those few products in float32. So the block sizes may be autotuned: they cannot
change what is selected.

Each row is stored in units of a power of two near its largest number, so the range of float16 never matters.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


class Narrow(NamedTuple):
    """Rows `numbers · scale` with float16 numbers, and of each row `norm = max(‖row‖, ‖narrow row‖)` and
    `error = ‖row − narrow row‖`."""

    numbers: Tensor
    scale: Tensor
    norm: Tensor
    error: Tensor


@triton.jit
def _narrow(
    source, source_row, source_column, numbers, scale, norm, error, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rounds whole rows to float16; reads them once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real, wide_row = row < n, row.to(tl.int64)[:, None]
    mask = real[:, None] & (column < d)[None, :]
    place = source + wide_row * source_row + column.to(tl.int64)[None, :] * source_column
    wide = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide), 1)
    # Only the exponent: dividing by a power of two is exact, and squares of the result neither under- nor overflow.
    unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.maximum(unit, 2.0**-126)  # for rows of zeros and subnormal numbers
    wide = wide / unit[:, None]
    narrow = wide.to(tl.float16)
    back = narrow.to(tl.float32)
    tl.store(numbers + wide_row * d + column[None, :], narrow, mask=mask)
    tl.store(scale + row, unit, mask=real)
    tl.store(norm + row, unit * tl.sqrt(tl.maximum(tl.sum(wide * wide, 1), tl.sum(back * back, 1))), mask=real)
    tl.store(error + row, unit * tl.sqrt(tl.sum((wide - back) * (wide - back), 1)), mask=real)


def narrowed(rows: Float[Tensor, "n d"]) -> Narrow:
    """The rows in float16, with their norms and rounding errors."""
    n, d = rows.shape
    made = Narrow(rows.new_empty((n, d), dtype=torch.float16), *torch.empty((3, n), device=rows.device).unbind())
    columns = triton.next_power_of_2(d)
    at_once = max(1, 2048 // columns)
    if n:
        _narrow[(triton.cdiv(n, at_once),)](rows, *rows.stride(), *made, n, d, ROWS=at_once, COLUMNS=columns)
    return made


@triton.jit
def _slack(x_norm, x_error, w_norm, w_error, doubt, rounding):
    """How far the screened values of a block may be from the exact ones (`screening_bound.md`, §4)."""
    return (
        x_error[:, None] * w_norm[None, :] + x_norm[:, None] * (w_error + rounding * w_norm)[None, :] + doubt[None, :]
    )


@triton.jit
def _packed(hits, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Booleans [ROWS, 32 · WIDE] as int32 words [ROWS, WIDE]."""
    bits = tl.reshape(hits.to(tl.int32), [ROWS, WIDE, 32]) << tl.arange(0, 32)[None, None, :]
    return tl.sum(bits, 2)


@triton.jit
def _screen(
    x,
    x_scale,
    x_norm,
    x_error,
    w,
    w_scale,
    w_norm,
    w_error,
    base,
    doubt,
    rounding,
    bar,
    bits,
    screened,
    lows,
    n,
    d_sae,
    d_in,
    words,
    groups,
    shrink,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """The product x̂ ŵᵀ of a block of ROWS × FEATURES.

    Without KEEP the bars are known: stores one bit per feature that may reach its row's bar, n · d_sae / 8 bytes.
    With KEEP it stores the product itself in float16, times `shrink`, and the largest sure value of each group of GROUP
    features. Reads (n / ROWS · d_sae + d_sae / FEATURES · n) · d_in · 2 bytes, mostly from the cache.
    """
    # Eight consecutive blocks of rows read the same features while these are in the cache.
    row_blocks, feature_blocks = tl.cdiv(n, ROWS), tl.cdiv(d_sae, FEATURES)
    program = tl.program_id(0)
    band = program // (8 * feature_blocks) * 8
    height = tl.minimum(row_blocks - band, 8)
    within = program % (8 * feature_blocks)
    row = (band + within % height) * ROWS + tl.arange(0, ROWS)
    first_feature = within // height * FEATURES
    feature = first_feature + tl.arange(0, FEATURES)
    real_row, real = row < n, feature < d_sae
    product = tl.full([ROWS, FEATURES], 0.0, tl.float32)
    for start in range(0, d_in, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        a = tl.load(
            x + row.to(tl.int64)[:, None] * d_in + inputs[None, :],
            mask=real_row[:, None] & (inputs < d_in)[None, :],
            other=0.0,
        )
        b = tl.load(
            w + feature.to(tl.int64)[None, :] * d_in + inputs[:, None],
            mask=real[None, :] & (inputs < d_in)[:, None],
            other=0.0,
        )
        product = tl.dot(a, b, product)
    base_here = tl.load(base + feature, mask=real, other=float("-inf"))
    units = tl.load(x_scale + row, mask=real_row, other=1.0)[:, None] * tl.load(w_scale + feature, mask=real, other=1.0)
    slack = _slack(
        tl.load(x_norm + row, mask=real_row, other=0.0),
        tl.load(x_error + row, mask=real_row, other=0.0),
        tl.load(w_norm + feature, mask=real, other=0.0),
        tl.load(w_error + feature, mask=real, other=0.0),
        tl.load(doubt + feature, mask=real, other=0.0),
        rounding,
    )
    value = product * units + base_here[None, :]
    if KEEP:
        place = screened + row.to(tl.int64)[:, None] * d_sae + feature[None, :]
        tl.store(place, (product * shrink).to(tl.float16), mask=real_row[:, None] & real[None, :])
        low = tl.max(tl.reshape(value - slack, [ROWS, FEATURES // GROUP, GROUP]), 2)
        group = first_feature // GROUP + tl.arange(0, FEATURES // GROUP)
        place = lows + row.to(tl.int64)[:, None] * groups + group[None, :]
        tl.store(place, low, mask=real_row[:, None] & (group < groups)[None, :])
    else:
        hits = value + slack >= tl.load(bar + row, mask=real_row, other=float("inf"))[:, None]
        word = first_feature // 32 + tl.arange(0, FEATURES // 32)
        place = bits + row.to(tl.int64)[:, None] * words + word[None, :]
        tl.store(place, _packed(hits, ROWS, FEATURES // 32), mask=real_row[:, None] & (word < words)[None, :])


@triton.jit
def _mark(
    screened,
    x_scale,
    x_norm,
    x_error,
    w_scale,
    w_norm,
    w_error,
    base,
    doubt,
    rounding,
    bar,
    bits,
    n,
    d_sae,
    words,
    grow,
    narrow_rounding,
    narrow_smallest,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The bits of `_screen`, from the product it stored with KEEP: reads 2 bytes per feature and writes one bit."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    feature = tl.program_id(1) * WORDS * 32 + tl.arange(0, WORDS * 32)
    real_row, real = row < n, feature < d_sae
    wide = row.to(tl.int64)[:, None]
    stored = tl.load(screened + wide * d_sae + feature[None, :], mask=real_row[:, None] & real[None, :], other=0.0).to(
        tl.float32
    )
    units = grow * tl.load(x_scale + row, mask=real_row, other=1.0)[:, None]
    units = units * tl.load(w_scale + feature, mask=real, other=1.0)[None, :]
    slack = _slack(
        tl.load(x_norm + row, mask=real_row, other=0.0),
        tl.load(x_error + row, mask=real_row, other=0.0),
        tl.load(w_norm + feature, mask=real, other=0.0),
        tl.load(w_error + feature, mask=real, other=0.0),
        tl.load(doubt + feature, mask=real, other=0.0),
        rounding,
    )
    slack += (tl.abs(stored) * narrow_rounding + narrow_smallest) * units
    value = stored * units + tl.load(base + feature, mask=real, other=float("-inf"))[None, :]
    hits = value + slack >= tl.load(bar + row, mask=real_row, other=float("inf"))[:, None]
    place = bits + wide * words + word[None, :]
    tl.store(place, _packed(hits, ROWS, WORDS), mask=real_row[:, None] & (word < words)[None, :])


@triton.jit
def _unpacked(bits, n, words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """A block of words as zeros and ones [ROWS, 32 · WORDS], its row numbers, and which of these rows exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    mask = (row < n)[:, None] & (word < words)[None, :]
    held = tl.load(bits + row.to(tl.int64)[:, None] * words + word[None, :], mask=mask, other=0)
    hits = (held[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(hits, [ROWS, WORDS * 32]), row, row < n


@triton.jit
def _count(bits, counts, n, words, chunks, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Counts the set bits in each chunk of WORDS words of a row."""
    hits, row, real = _unpacked(bits, n, words, ROWS, WORDS)
    tl.store(counts + row.to(tl.int64) * chunks + tl.program_id(1), tl.sum(hits, 1), mask=real)


@triton.jit
def _list(bits, starts, features, n, words, chunks, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Writes the positions of the set bits of each chunk, ascending, to features[starts[row, chunk] …]."""
    hits, row, real = _unpacked(bits, n, words, ROWS, WORDS)
    start = tl.load(starts + row.to(tl.int64) * chunks + tl.program_id(1), mask=real, other=0)
    feature = tl.program_id(1) * WORDS * 32 + tl.arange(0, WORDS * 32)
    place = start[:, None] + tl.cumsum(hits, 1) - 1
    tl.store(features + place, tl.broadcast_to(feature[None, :], [ROWS, WORDS * 32]), mask=hits == 1)
