"""The `wanted` largest ranks of a whole batch, without a sort and without asking the device anything.

Three histograms of 11, 10 and 10 bits find the exact bits of the last rank that is wanted; every program derives the
digits found so far itself. Only integers are added atomically, so the result is the same on every run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_step.select import exact_products, keep_entries

DIGITS: tl.constexpr = tl.constexpr(2048)  # bins of the first digit; the other two have half as many
LATER_BITS: tl.constexpr = tl.constexpr(20)  # of the other two


@triton.jit
def batch_bar(histogram, wanted):
    """A lower bound of the batch's `wanted`-th largest rank: that of the groups' sure ranks, without its last bits.

    Zero where fewer groups have a sure rank.
    """
    digit, left, enough = digit_of(tl.load(histogram + tl.arange(0, DIGITS)), wanted, DIGITS)
    return tl.where(enough > 0, digit << LATER_BITS, 0).to(tl.float32, bitcast=True)


@triton.jit
def evaluate(
    centred,
    w,
    bias,
    lift,
    candidates,
    count,
    values,
    ranks,
    histograms,
    flags,
    d,
    ROOM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pre-activations of a row's candidates in float32, and their ranks: value + lift where positive, else zero.

    Also counts the first digit of the ranks.
    """
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    feature, there, pre = exact_products(centred, w, bias, candidates, count, row, d, ROOM, COLUMNS)
    rank = tl.where(there & (pre > 0), pre + tl.load(lift + feature, mask=there, other=0.0), 0.0)
    place = row * ROOM + tl.arange(0, ROOM)
    tl.store(values + place, pre)
    tl.store(ranks + place, rank)
    _count_first_digit(rank.to(tl.int32, bitcast=True), histograms)


@triton.jit
def _count_first_digit(key, histogram):
    bin = tl.arange(0, DIGITS)
    counts = tl.histogram(key >> LATER_BITS, DIGITS) - tl.where(bin == 0, tl.sum((key == 0).to(tl.int32), 0), 0)
    tl.atomic_add(histogram + bin, counts, mask=counts > 0)


@triton.jit
def digit_of(count, left, BINS: tl.constexpr):
    """The bin in which the `left`-th largest lies, how many of it are still wanted, and whether there are so many."""
    bin = tl.arange(0, BINS)
    above = tl.sum(count, 0) - tl.cumsum(count, 0)
    hit = (above < left) & (above + count >= left)
    digit = tl.sum(tl.where(hit, bin, 0), 0)
    return digit, left - tl.sum(tl.where(hit, above, 0), 0), tl.sum(hit.to(tl.int32), 0)


@triton.jit
def _found(histograms, wanted, ROUND: tl.constexpr):
    """The leading bits of the smallest rank that is wanted, how many equal to it are, and whether there are so many."""
    prefix, left, enough = 0, wanted, 1
    if ROUND > 0:
        prefix, left, enough = digit_of(tl.load(histograms + tl.arange(0, DIGITS)), left, DIGITS)
    if ROUND > 1:
        later = histograms + DIGITS + tl.arange(0, DIGITS // 2)
        digit, left, _ = digit_of(tl.load(later), left, DIGITS // 2)
        prefix = prefix * (DIGITS // 2) + digit
    if ROUND > 2:
        last = histograms + DIGITS + DIGITS // 2 + tl.arange(0, DIGITS // 2)
        digit, left, _ = digit_of(tl.load(last), left, DIGITS // 2)
        prefix = prefix * (DIGITS // 2) + digit
    return prefix, left, enough


@triton.jit
def count_digits(ranks, histograms, flags, wanted, n, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    """The histogram of one digit of the ranks that share all earlier digits with the one looked for."""
    if tl.load(flags) != 0:
        return
    prefix, left, enough = _found(histograms, wanted, ROUND)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(ranks + i, mask=i < n, other=0.0).to(tl.int32, bitcast=True)
    if ROUND == 0:
        _count_first_digit(key, histograms)
    elif ROUND == 1:
        tl.atomic_add(histograms + DIGITS + ((key >> 10) & 1023), 1, mask=(key > 0) & ((key >> LATER_BITS) == prefix))
    else:
        start = histograms + DIGITS + DIGITS // 2
        tl.atomic_add(start + (key & 1023), 1, mask=(key > 0) & ((key >> 10) == prefix))


@triton.jit
def count_ties(ranks, histograms, ties, flags, wanted, ROOM: tl.constexpr):
    """How many ranks of a row equal the smallest that is wanted."""
    if tl.load(flags) != 0:
        return
    bar, left, enough = _found(histograms, wanted, 3)
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(ranks + row * ROOM + tl.arange(0, ROOM)).to(tl.int32, bitcast=True)
    tl.store(ties + row, tl.sum(((key == bar) & (key > 0)).to(tl.int32), 0))


@triton.jit
def keep_largest(
    values_of_candidates,
    ranks,
    candidates,
    histograms,
    ties,
    features,
    values,
    kept,
    counts,
    bitmap,
    smallest_rank,
    flags,
    wanted,
    width,
    words,
    ROOM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A row's entries among the largest of the batch; of equal ranks the first rows', and within a row the first."""
    if tl.load(flags) != 0:
        return
    bar, left, enough = _found(histograms, wanted, 3)
    row = tl.program_id(0).to(tl.int64)
    place = row * ROOM + tl.arange(0, ROOM)
    key = tl.load(ranks + place).to(tl.int32, bitcast=True)
    other = tl.arange(0, ROWS)
    before = tl.sum(tl.load(ties + other, mask=other < row, other=0), 0)
    tied = ((key == bar) & (key > 0)).to(tl.int32)
    keep = (key > bar) | ((tied == 1) & (before + tl.cumsum(tied, 0) <= left))
    keep = tl.where(enough > 0, keep, key > 0)
    feature = tl.load(candidates + place, mask=keep, other=0)
    value = tl.load(values_of_candidates + place, mask=keep, other=0.0)
    keep_entries(features, values, kept, counts, bitmap, row, feature, value, keep, width, words)
    tl.atomic_min(smallest_rank, tl.min(tl.where(keep, key, 0x7F800000), 0))
