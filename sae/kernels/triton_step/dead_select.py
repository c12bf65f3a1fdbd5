"""AuxK's kernels: which features are dead, which of them are strongest on a row, and what reaches them from the error.

Dead features lie together in `slots`; there is room for a fixed number of them, and slots without one are all zero.
Source of AuxK: Gao et al. 2024 (arXiv 2406.04093), A.2, as in `sae.training.losses.aux_k_loss`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_step.batch_select import digit_of

LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)  # what torch.nan_to_num makes of infinity


@triton.jit
def find_dead(silent, slots, dead, n_dead, flags, dead_after, d_sae, room, FEATURES: tl.constexpr):
    """The features that are silent for `dead_after` rows, ascending, and each one's slot (−1: it is not dead).

    Halts if they are more than there is room for.
    """
    found = 0
    for start in range(0, d_sae, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        inside = feature < d_sae
        is_dead = inside & (tl.load(silent + feature, mask=inside, other=0) >= dead_after)
        hits = is_dead.to(tl.int32)
        place = found + tl.cumsum(hits, 0) - hits
        tl.store(slots + feature, tl.where(is_dead, place, -1), mask=inside)
        tl.store(dead + place, feature, mask=is_dead & (place < room))
        found += tl.sum(hits, 0)
    tl.store(n_dead, found)
    if found > room:
        tl.atomic_or(flags, 4)


@triton.jit
def gather_dead(w_enc, b_enc, w_dec, dead, n_dead, dead_enc, dead_b, dead_dec, flags, d, COLUMNS: tl.constexpr):
    """A slot's encoder row, bias and decoder row; zeros where it has no feature."""
    if tl.load(flags) != 0:
        return
    slot = tl.program_id(0).to(tl.int64)
    there = slot < tl.load(n_dead)
    feature = tl.load(dead + slot, mask=there, other=0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    mask = column < d
    row = tl.load(w_enc + feature * d + column, mask=mask & there, other=0.0)
    tl.store(dead_enc + slot * d + column, row, mask=mask)
    row = tl.load(w_dec + feature * d + column, mask=mask & there, other=0.0)
    tl.store(dead_dec + slot * d + column, row, mask=mask)
    tl.store(dead_b + slot, tl.load(b_enc + feature, mask=there, other=0.0))


@triton.jit
def _with_next_digit(row, room, bar, left, SHIFT: tl.constexpr, BINS: tl.constexpr, SLOTS: tl.constexpr):
    """`bar` with one digit more; `left` numbers are wanted of those that share its digits so far."""
    bin = tl.arange(0, BINS)
    counts = tl.full([BINS], 0, tl.int32)
    for start in range(0, room, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        value = tl.load(row + slot, mask=slot < room, other=0.0)
        key = tl.where(value > 0, value.to(tl.int32, bitcast=True), 0)
        mine = (key > 0) & ((key // BINS >> SHIFT) == bar)
        counts += tl.histogram(tl.where(mine, (key >> SHIFT) & (BINS - 1), 0), BINS)
        counts -= tl.where(bin == 0, tl.sum((mine == 0).to(tl.int32), 0), 0)
    found, left, some = digit_of(counts, left, BINS)
    return bar * BINS + found, left, some


@triton.jit
def keep_strongest(acts, n_dead, flags, most, room, SLOTS: tl.constexpr):
    """Leaves the min(most, dead) largest positive numbers of a row, of equal ones the first, and zeros all others.

    The exact bits of the smallest that is kept are found digit by digit, from histograms.
    """
    if tl.load(flags) != 0:
        return
    row = acts + tl.program_id(0).to(tl.int64) * room
    wanted = tl.minimum(tl.load(n_dead), most)
    bar, left, enough = 0, wanted, 1
    if wanted < tl.load(n_dead):
        bar, left, enough = _with_next_digit(row, room, 0, left, 20, 2048, SLOTS)
        bar, left, _ = _with_next_digit(row, room, bar, left, 10, 1024, SLOTS)
        bar, left, _ = _with_next_digit(row, room, bar, left, 0, 1024, SLOTS)
    all_of_them = (enough == 0) | (wanted >= tl.load(n_dead))
    bar = tl.where(all_of_them, 0, bar)
    seen = 0
    for start in range(0, room, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        value = tl.load(row + slot, mask=slot < room, other=0.0)
        key = tl.where(value > 0, value.to(tl.int32, bitcast=True), 0)
        tied = ((key == bar) & (key > 0)).to(tl.int32)
        keep = (key > bar) | ((tied == 1) & (seen + tl.cumsum(tied, 0) <= left))
        keep = keep & (wanted > 0)
        tl.store(row + slot, tl.where(keep, value, 0.0), mask=slot < room)
        seen += tl.sum(tied, 0)


@triton.jit
def spread(source, row_factor, column, mask, rows, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the columns of `row_factor · source`: the sum of squared distances from their means."""
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        place = source + row.to(tl.int64)[:, None] * d + column[None, :]
        total += tl.load(place, mask=(row < rows)[:, None] & mask[None, :], other=0.0) * row_factor
    mean = tl.sum(total, 0) / rows
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & mask[None, :]
        off = tl.load(source + row.to(tl.int64)[:, None] * d + column[None, :], mask=here, other=0.0) * row_factor
        off = tl.where(here, off - mean[None, :], 0.0)
        total += off * off
    return tl.sum(tl.sum(total, 0), 0)


@triton.jit
def squares(source, column, mask, rows, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of the squares of some columns."""
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        place = source + row.to(tl.int64)[:, None] * d + column[None, :]
        number = tl.load(place, mask=(row < rows)[:, None] & mask[None, :], other=0.0)
        total += number * number
    return tl.sum(tl.sum(total, 0), 0)


@triton.jit
def pass_back(
    acts,
    d_acts,
    d_bias,
    parts,
    n_parts,
    n_dead,
    factor,
    losses,
    flags,
    coefficient,
    rows,
    room,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The gradients of the kept activations and of the slots' biases, both but for `factor`; the loss with AuxK.

    `AuxK = coefficient · V(y) / rows · ‖e − ê‖² / V(e)`, V the sum of squares about the columns' means, so that
    `∂AuxK/∂ê = factor · (e − ê)`. The three sums come in `parts`, by block of columns.
    """
    if tl.load(flags) != 0:
        return
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * room + column[None, :]
        here = (row < rows)[:, None] & (column < room)[None, :]
        kept = tl.load(acts + place, mask=here, other=0.0) > 0
        gradient = tl.where(kept, tl.load(d_acts + place, mask=here, other=0.0), 0.0)
        tl.store(d_acts + place, gradient, mask=here)
        total += gradient
    tl.store(d_bias + column, tl.sum(total, 0), mask=column < room)
    if tl.program_id(0) == 0:
        part = tl.arange(0, PARTS)
        of_error = tl.sum(tl.load(parts + part, mask=part < n_parts, other=0.0), 0)
        of_target = tl.sum(tl.load(parts + n_parts + part, mask=part < n_parts, other=0.0), 0)
        unexplained = tl.sum(tl.load(parts + 2 * n_parts + part, mask=part < n_parts, other=0.0), 0)
        some = (tl.load(n_dead) > 0) & (of_error > 0)
        weight = coefficient * (of_target / rows)
        share = tl.where(some, unexplained / of_error, 0.0)
        usual = share < float("inf")
        tl.store(factor, tl.where(some & usual, -2.0 * weight / of_error, 0.0))
        share = tl.where(usual, share, tl.where(share == share, LARGEST, 0.0))
        loss = tl.load(losses) + weight * share
        tl.store(losses, loss)
        if not (tl.abs(loss) < float("inf")):
            tl.atomic_or(flags, 1)
