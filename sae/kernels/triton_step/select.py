"""Which candidates of a row are active: their products in float32, and the choice among them."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exact_products(centred, w, bias, candidates, count, row, d, ROOM: tl.constexpr, COLUMNS: tl.constexpr):
    """The candidates of a row, which of them exist, and their pre-activations in float32.

    In bfloat16 `centred` is the screened product itself, with d features in a row: these are the pre-activations.
    """
    place = tl.arange(0, ROOM)
    there = place < tl.load(count + row)
    feature = tl.load(candidates + row * ROOM + place, mask=there, other=0)
    wide = feature.to(tl.int64)
    if centred.dtype.element_ty == tl.bfloat16:
        pre = tl.load(centred + row * d + wide, mask=there, other=0.0).to(tl.float32)
    else:
        total = tl.full([ROOM, COLUMNS], 0.0, tl.float32)
        for start in range(0, d, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = column < d
            left = tl.load(centred + row * d + column, mask=mask, other=0.0)
            right = tl.load(w + wide[:, None] * d + column[None, :], mask=there[:, None] & mask[None, :], other=0.0)
            total += left[None, :] * right
        pre = tl.sum(total, 1) + tl.load(bias + wide, mask=there, other=0.0)
    return feature, there, pre


@triton.jit
def keep_entries(features, values, kept, counts, bitmap, row, feature, value, keep, width, words):
    """Writes the chosen entries of a row in the order of features, counts them by feature, and marks their rows."""
    chosen = keep.to(tl.int32)
    place = tl.cumsum(chosen, 0) - chosen
    tl.store(features + row * width + place, feature, mask=keep)
    tl.store(values + row * width + place, value, mask=keep)
    tl.store(kept + row, tl.sum(chosen, 0))
    tl.atomic_add(counts + feature, 1, mask=keep)
    bit = (row % 32).to(tl.int32)
    word = bitmap + feature.to(tl.int64) * words + row // 32
    tl.atomic_or(word, (1 << bit) + feature * 0, mask=keep)


@triton.jit
def choose_above(
    centred,
    w,
    bias,
    candidates,
    count,
    features,
    values,
    kept,
    counts,
    bitmap,
    flags,
    own,
    b_mag,
    pre_activations,
    bandwidth,
    d,
    width,
    words,
    PENALTY: tl.constexpr,
    ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every positive candidate of a row: ReLU. "gates": their magnitudes by r_mag (`own`) and b_mag, zero or more.

    "jumps": those above their threshold (`own`), and at zero those less than half a bandwidth below it.
    """
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    feature, there, pre = exact_products(centred, w, bias, candidates, count, row, d, ROOM, COLUMNS)
    keep, value = there & (pre > 0), pre
    if PENALTY == "jumps":
        bar = tl.load(own + feature, mask=there, other=0.0)
        keep = there & ((pre > bar) | (tl.abs(pre - bar) < bandwidth / 2))
        value = tl.where(pre > bar, pre, 0.0)
    if PENALTY == "gates":
        stretch = tl.exp(tl.load(own + feature, mask=keep, other=0.0))
        stretched = stretch * (pre - tl.load(bias + feature, mask=keep, other=0.0))
        value = tl.maximum(stretched + tl.load(b_mag + feature, mask=keep, other=0.0), 0.0)
    keep_entries(features, values, kept, counts, bitmap, row, feature, value, keep, width, words)
    if (PENALTY == "jumps") | (PENALTY == "gates"):
        chosen = keep.to(tl.int32)
        tl.store(pre_activations + row * width + tl.cumsum(chosen, 0) - chosen, pre, mask=keep)


@triton.jit
def choose(
    centred,
    w,
    bias,
    candidates,
    count,
    features,
    values,
    kept,
    counts,
    bitmap,
    flags,
    k,
    d,
    width,
    words,
    ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The k largest positive candidates of a row; of equal ones the first.

    Finds the k-th largest bit by bit: positive float32 numbers are ordered as their bits are, read as integers.
    """
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    feature, there, pre = exact_products(centred, w, bias, candidates, count, row, d, ROOM, COLUMNS)
    key = tl.where(there & (pre > 0), pre.to(tl.int32, bitcast=True), 0)
    bar = 0
    for step in range(31):
        higher = bar | (1 << (30 - step))
        bar = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= k, higher, bar)
    tied = ((key == bar) & (key > 0)).to(tl.int32)
    allowed = k - tl.sum((key > bar).to(tl.int32), 0)
    keep = (key > bar) | ((tied == 1) & (tl.cumsum(tied, 0) <= allowed))
    keep_entries(features, values, kept, counts, bitmap, row, feature, pre, keep, width, words)
