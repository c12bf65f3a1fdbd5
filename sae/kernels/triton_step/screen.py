"""The first stages: rows in float16, their screened product's group maxima, and the candidates of each row.

The bound is that of `sae/kernels/screening_bound.md`, with the encoder's norms held by group of features.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_step.batch_select import batch_bar
from sae.kernels.triton_step.dead_select import find_dead
from sae.kernels.triton_step.narrow import in_type_of, rounding


@triton.jit
def prepare(
    x,
    b_dec,
    scale,
    centred,
    narrow,
    row_error,
    row_floor,
    step,
    steps_done,
    entry_count,
    histograms,
    smallest_rank,
    active,
    coming_flags,
    silent,
    slots,
    dead,
    n_dead,
    flags,
    dead_after,
    d_sae,
    dead_room,
    rows,
    d,
    subnormal,
    PRE_BIAS: tl.constexpr,
    HISTOGRAMS: tl.constexpr,
    AUX: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of a row: x · scale − b_dec in float32 and float16, and what the screen may be off per unit of a feature's norm.

    Without PRE_BIAS nothing is subtracted. Also what a step starts from: its number, and counters at zero.
    AUX: one more program finds the dead features.
    """
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    if AUX:
        is_of_no_row = row == rows
        if is_of_no_row:
            find_dead(silent, slots, dead, n_dead, flags, dead_after, d_sae, dead_room, FEATURES=1024)
            return
    column = tl.arange(0, COLUMNS)
    mask = column < d
    wide = tl.load(x + row * d + column, mask=mask, other=0.0) * scale
    if PRE_BIAS:
        wide -= tl.load(b_dec + column, mask=mask, other=0.0)
    thin = in_type_of(narrow, wide)
    back = thin.to(tl.float32)
    tl.store(centred + row * d + column, wide, mask=mask)
    tl.store(narrow + row * d + column, thin, mask=mask)
    off = wide - back
    norm = tl.sqrt(tl.maximum(tl.sum(wide * wide, 0), tl.sum(back * back, 0)))
    error = tl.sqrt(tl.sum(off * off, 0))
    # ‖w − ŵ‖ ≤ 2⁻¹¹ ‖w‖, but for subnormal numbers, each off by 2⁻²⁵ at most; sums: d / 8 + 64 roundings of 2⁻²³
    tl.store(row_error + row, error + norm * (2.0**-11 + (d / 8 + 64) * 2.0**-23))
    tl.store(row_floor + row, norm * subnormal)
    if HISTOGRAMS > 0:
        for start in range(tl.program_id(0) * 1024, HISTOGRAMS, rows * 1024):
            tl.store(histograms + start + tl.arange(0, 1024), tl.full([1024], 0, tl.int32))
    if row == 0:
        tl.store(step, tl.load(steps_done))
        tl.store(entry_count, 0)
        tl.store(active, 0)
        tl.store(smallest_rank, 0x7F800000)  # infinity
        tl.atomic_or(flags, tl.load(coming_flags))  # this launch only writes what the next step writes again


@triton.jit
def _slack(screened, row_error, row_floor, row, group_norm, group_floor, group, groups):
    """How far a screened value of a group may be off, but for its own rounding."""
    norm = tl.load(group_norm + group, mask=group < groups, other=0).to(tl.float32, bitcast=True)
    floor = tl.load(group_floor + group, mask=group < groups, other=0).to(tl.float32, bitcast=True)
    slack = tl.load(row_error + row) * norm + floor + tl.load(row_floor + row)
    if screened.dtype.element_ty == tl.bfloat16:
        slack = tl.where(slack < float("inf"), 0.0, float("inf"))  # what is not finite still rules nothing out
    return slack


@triton.jit
def group_maxima(
    screened,
    best,
    row_error,
    row_floor,
    group_norm,
    group_floor,
    lift,
    sure_ranks,
    flags,
    d_sae,
    groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    RANKED: tl.constexpr,
):
    """The largest screened value of each group of features: the one pass over everything that the product wrote.

    With RANKED also each group's largest sure rank (value + lift), or zero, from which the batch's bar follows.
    """
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    feature = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = feature < d_sae
    value = tl.load(screened + row * d_sae + feature, mask=inside, other=float("-inf")).to(tl.float32)
    tl.store(best + row * groups + group, tl.max(value, 1).to(best.dtype.element_ty), mask=group < groups)
    if RANKED:
        slack = _slack(screened, row_error, row_floor, row, group_norm, group_floor, group, groups)
        low = value - slack[:, None] - rounding(screened, value)
        sure = tl.where(inside & (low > 0), low + tl.load(lift + feature, mask=inside, other=0.0), 0.0)
        rank = tl.max(sure, 1) * (1 - 2.0**-22)  # the exact sum is rounded, too
        tl.store(sure_ranks + row * groups + group, rank, mask=group < groups)


@triton.jit
def row_bar(
    best,
    row_error,
    row_floor,
    group_norm,
    group_floor,
    bar,
    flags,
    k,
    groups,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A lower bound of a row's k-th largest: the leading bits of the k-th largest sure maximum of a group."""
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    value = tl.load(best + row * groups + group, mask=group < groups, other=float("-inf")).to(tl.float32)
    slack = _slack(best, row_error, row_floor, row, group_norm, group_floor, group, groups)
    low = value - slack - rounding(best, value)
    key = tl.where(low > 0, low.to(tl.int32, bitcast=True), 0)
    found = 0
    for step in range(STEPS):
        higher = found | (1 << (30 - step))
        found = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= k, higher, found)
    tl.store(bar + row, found.to(tl.float32, bitcast=True))


@triton.jit
def collect(
    screened,
    best,
    row_error,
    row_floor,
    group_norm,
    group_floor,
    bar,
    histogram,
    lift,
    candidates,
    count,
    flags,
    d_sae,
    groups,
    wanted,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROOM: tl.constexpr,
    BAR: tl.constexpr,
    LIFTED: tl.constexpr,
    POSITIVE: tl.constexpr,
    SKIP: tl.constexpr,
):
    """The features that may be active in a row, ascending: those whose value plus lift may reach the bar.

    BAR: that of the row, of the batch's histogram, or 0. POSITIVE: their value may be positive, too. SKIP: `best` is
    known, and groups that cannot have one are not read.
    """
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0).to(tl.int64)
    if BAR == "row":
        least = tl.load(bar + row)
    elif BAR == "batch":
        least = batch_bar(histogram, wanted)
    else:
        least = 0.0
    found = 0
    bounded = 0
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        slack = _slack(screened, row_error, row_floor, row, group_norm, group_floor, group, groups)
        bounded += tl.sum((slack < float("inf")).to(tl.int32), 0)
        feature = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        here = feature < d_sae
        if LIFTED:
            own = tl.load(lift + feature, mask=here, other=-1e38)  # finite: infinities would cancel to NaN
        if SKIP:
            top = tl.load(best + row * groups + group, mask=group < groups, other=0.0).to(tl.float32)
            high = top + slack + rounding(screened, top)
            reach = high
            if LIFTED:
                most = tl.max(own, 1)
                reach = high + most + (tl.abs(high) + tl.abs(most)) * 2.0**-22
            some = reach >= least
            if POSITIVE:
                some = some & (high > 0)
            here = here & some[:, None]
        value = tl.load(screened + row * d_sae + feature, mask=here, other=0.0).to(tl.float32)
        high = value + slack[:, None] + rounding(screened, value)
        reach = high
        if LIFTED:
            reach = high + own + (tl.abs(high) + tl.abs(own)) * 2.0**-22
        hit = here & (reach >= least)
        if POSITIVE:
            hit = hit & (high > 0)
        hits = hit.to(tl.int32)
        in_group = tl.sum(hits, 1)
        before = found + tl.cumsum(in_group, 0) - in_group
        place = before[:, None] + tl.cumsum(hits, 1) - hits
        tl.store(candidates + row * ROOM + place, feature, mask=hit & (place < ROOM))
        found += tl.sum(in_group, 0)
    tl.store(count + row, found)
    if found > ROOM:
        tl.atomic_or(flags, 2)
    # A bound that is not finite rules nothing out correctly. Groups past the last one have the row's own part alone.
    if bounded < tl.cdiv(groups, GROUPS) * GROUPS:
        tl.atomic_or(flags, 1)
