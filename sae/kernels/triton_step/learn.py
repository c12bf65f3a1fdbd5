"""The last stages: gradients by feature and Adam's step on them in one pass, so that no gradient is stored."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_adam import moved
from sae.kernels.triton_step.by_feature import sums_of_entries
from sae.kernels.triton_step.narrow import in_type_of
from sae.kernels.triton_step.penalty import coefficient_now, keep_annealed, rates_now, search

LEVEL_RATE: tl.constexpr = tl.constexpr(0.01)
SILENT_FOR: tl.constexpr = tl.constexpr(4.0)  # as in `sae.training.revival`


@triton.jit
def encoder_gradient(
    feature,
    entries,
    starts,
    counts,
    d_values,
    centred,
    slots,
    dead_gradients,
    dead_d_b,
    aux_factor,
    column,
    mask,
    width,
    d,
    AUX: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of a feature's encoder row and of its pre-activation's bias."""
    first, n = tl.load(starts + feature), tl.load(counts + feature)
    g, d_b = sums_of_entries(entries, first, n, d_values, centred, column, mask, width, d, ENTRIES, COLUMNS)
    if AUX:
        slot = tl.load(slots + feature)
        g += tl.load(aux_factor) * of_slot(dead_gradients, slot, column, mask, d)
        d_b += tl.load(aux_factor) * tl.load(dead_d_b + slot, mask=slot >= 0, other=0.0)
    return g, d_b


@triton.jit
def decoder_gradient(
    feature,
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
    dead_gradients,
    aux_factor,
    penalty,
    rates,
    step,
    column,
    mask,
    width,
    rows,
    d,
    rates_held,
    AUX: tl.constexpr,
    PENALTY: tl.constexpr,
    SITES: tl.constexpr,
    PREFIXES: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of a feature's decoder row p, from the rows that it is active on."""
    prefix = feature * 0
    for end in tl.static_range(PREFIXES - 1):
        prefix += (feature >= tl.load(prefix_ends + end)).to(tl.int64)
    source = gradient + prefix * rows * d
    first, n = tl.load(starts + feature), tl.load(counts + feature)
    g, total = sums_of_entries(entries, first, n, values, source, column, mask, width, d, ENTRIES, COLUMNS)
    if AUX:
        g += tl.load(aux_factor) * of_slot(dead_gradients, tl.load(slots + feature), column, mask, d)
    if PENALTY == "norms":
        site = tl.load(site_of + column, mask=mask, other=0)
        norm = tl.load(norms + feature * SITES + site, mask=mask, other=0.0)
        weight = coefficient_now(penalty, rates_now(rates, step, rates_held)) / rows * total
        g += tl.where(norm > 0, weight / tl.where(norm > 0, norm, 1.0), 0.0) * p
    return g


@triton.jit
def learn_decoder(
    w,
    exp_avg,
    exp_avg_sq,
    gradient,
    values,
    entries,
    starts,
    counts,
    prefix_ends,
    norms,
    site_of,
    slots,
    dead_gradients,
    aux_factor,
    clip_factor,
    penalty,
    rates,
    step,
    flags,
    rest1,
    beta2,
    rest2,
    eps,
    width,
    rows,
    d,
    rates_held,
    AUX: tl.constexpr,
    CLIPPED: tl.constexpr,
    PENALTY: tl.constexpr,
    SITES: tl.constexpr,
    UNIT: tl.constexpr,
    PREFIXES: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A feature's decoder row: its gradient, made from its entries, and Adam's step (UNIT: at unit norm).

    With "norms" also the norms of its parts, for the next step.
    """
    if tl.load(flags) != 0:
        return
    feature = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    mask = column < d
    at = feature * d + column
    p = tl.load(w + at, mask=mask, other=0.0)
    g = decoder_gradient(
        feature,
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
        dead_gradients,
        aux_factor,
        penalty,
        rates,
        step,
        column,
        mask,
        width,
        rows,
        d,
        rates_held,
        AUX,
        PENALTY,
        SITES,
        PREFIXES,
        ENTRIES,
        COLUMNS,
    )
    if CLIPPED:
        g *= tl.load(clip_factor)
    if UNIT:
        g -= tl.sum(g * p, 0) * p
    now = rates_now(rates, step, rates_held)
    rate, correction = tl.load(now), tl.load(now + 1)
    p = moved(p, g, exp_avg, exp_avg_sq, at, mask, rate, rest1, beta2, rest2, correction, eps)
    if UNIT:
        p = p / tl.maximum(tl.sqrt(tl.sum(tl.where(mask, p * p, 0.0), 0)), 1e-12)
    tl.store(w + at, p, mask=mask)
    if PENALTY == "norms":
        site = tl.load(site_of + column, mask=mask, other=-1)
        for each in tl.static_range(SITES):
            square = tl.sum(tl.where(site == each, p * p, 0.0), 0)
            tl.store(norms + feature * SITES + each, tl.sqrt(square))


@triton.jit
def of_slot(dead_gradients, slot, column, mask, d):
    """What a dead feature's row learns from AuxK; zeros for a feature that is not dead."""
    place = tl.maximum(slot, 0).to(tl.int64) * d + column
    return tl.load(dead_gradients + place, mask=mask & (slot >= 0), other=0.0)


@triton.jit
def finite_bits(number):
    """A number that is not negative as an integer of the same order; NaN, whatever its sign, as infinity."""
    return tl.where(number < float("inf"), number, float("inf")).to(tl.int32, bitcast=True)


@triton.jit
def learn_encoder(
    w,
    exp_avg,
    exp_avg_sq,
    b,
    b_exp_avg,
    b_exp_avg_sq,
    narrow,
    narrow_b,
    group_norm,
    group_floor,
    centred,
    d_values,
    entries,
    starts,
    counts,
    bitmap,
    silent,
    through_encoder,
    threshold,
    lift,
    level,
    next_level,
    smallest_rank,
    slots,
    dead_gradients,
    dead_d_b,
    aux_factor,
    clip_factor,
    fired,
    bias_less,
    mean_threshold,
    rates,
    step,
    flags,
    rest1,
    beta2,
    rest2,
    eps,
    wanted_firings,
    min_density,
    patience,
    width,
    d,
    d_sae,
    words,
    rows,
    rates_held,
    AUX: tl.constexpr,
    CLIPPED: tl.constexpr,
    PENALTY: tl.constexpr,
    REVIVES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A feature's encoder row and bias, their float16 copy and its norm for the next screen, and its silent rows.

    A program takes every n-th feature, so that it adds up what reaches b_dec through the encoder in one fixed order.
    With THRESHOLDS also batch-topk's thresholds (`sae.training.batch_topk_threshold`); with REVIVES biases of silent
    JumpReLU features rise (`sae.training.revival`).
    """
    if tl.load(flags) != 0:
        return
    column = tl.arange(0, COLUMNS)
    mask = column < d
    now = rates_now(rates, step, rates_held)
    rate, correction = tl.load(now), tl.load(now + 1)
    through = tl.full([COLUMNS], 0.0, tl.float32)
    if THRESHOLDS:
        old_level = tl.load(level)
        smallest = tl.load(smallest_rank).to(tl.float32, bitcast=True)
        some = smallest < float("inf")
        begun = (tl.load(step) > 0) | (old_level > 0)
        new_level = tl.where(begun, old_level + LEVEL_RATE * (smallest - old_level), smallest)
        new_level = tl.where(some, new_level, old_level)
    for feature in range(tl.program_id(0), d_sae, tl.num_programs(0)):
        wide = tl.cast(feature, tl.int64)
        at = wide * d + column
        p = tl.load(w + at, mask=mask, other=0.0)
        first, n = tl.load(starts + feature), tl.load(counts + feature)
        g, d_b = encoder_gradient(
            feature,
            entries,
            starts,
            counts,
            d_values,
            centred,
            slots,
            dead_gradients,
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
        through -= d_b * p
        if PENALTY == "gates":
            d_b -= tl.load(bias_less + feature)
        if CLIPPED:
            g *= tl.load(clip_factor)
            d_b *= tl.load(clip_factor)
        p = moved(p, g, exp_avg, exp_avg_sq, at, mask, rate, rest1, beta2, rest2, correction, eps)
        tl.store(w + at, p, mask=mask)
        bias = tl.load(b + feature)
        bias = moved(bias, d_b, b_exp_avg, b_exp_avg_sq, feature, True, rate, rest1, beta2, rest2, correction, eps)
        if THRESHOLDS:
            own = tl.load(lift + feature)
            if wanted_firings > 0:
                own += new_level / patience * (wanted_firings - n)
                bias += tl.where(some, tl.maximum(own - new_level, 0.0), 0.0)
            bar = new_level - tl.minimum(tl.maximum(own, 0.0), new_level)
            bar = tl.where(some, bar, tl.load(threshold + feature))
            tl.store(threshold + feature, bar)
            tl.atomic_max(next_level, bar.to(tl.int32, bitcast=True))
        firings = n
        if (PENALTY == "jumps") | (PENALTY == "gates"):
            firings = tl.load(fired + feature)
        silence = tl.where(firings > 0, 0, tl.load(silent + feature) + rows)
        tl.store(silent + feature, silence)
        if REVIVES:
            unit = tl.maximum(tl.maximum(tl.load(threshold + feature), tl.load(mean_threshold)), 0.0)
            bias += tl.where(
                silence.to(tl.float32) * min_density >= SILENT_FOR, unit * (wanted_firings / patience), 0.0
            )
        tl.store(b + feature, bias)
        thin = in_type_of(narrow, p)
        back = thin.to(tl.float32)
        tl.store(narrow + at, thin, mask=mask)
        tl.store(narrow_b + feature, in_type_of(narrow_b, bias))
        p = tl.where(mask, p, 0.0)
        norm = tl.sqrt(tl.maximum(tl.sum(p * p, 0), tl.sum(back * back, 0))) * (1 + 2.0**-20)
        floor = tl.abs(bias) * (2.0**-11 + 2.0**-21) + 2.0**-20 * norm + 2.0**-24
        tl.atomic_max(group_norm + feature // GROUP, finite_bits(norm))
        tl.atomic_max(group_floor + feature // GROUP, finite_bits(floor))
        for start in range(0, n, ENTRIES):
            i = start + tl.arange(0, ENTRIES)
            row = tl.load(entries + first + i, mask=i < n, other=0) // width
            tl.store(bitmap + wide * words + row // 32, tl.full([ENTRIES], 0, tl.int32), mask=i < n)
        tl.store(counts + feature, 0)
    tl.store(through_encoder + tl.program_id(0) * d + column, through, mask=mask)


@triton.jit
def learn_skip(
    w,
    exp_avg,
    exp_avg_sq,
    gradient,
    clip_factor,
    rates,
    step,
    flags,
    rest1,
    beta2,
    rest2,
    eps,
    n,
    rates_held,
    CLIPPED: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """A transcoder's linear part: Adam's step on its n numbers."""
    if tl.load(flags) != 0:
        return
    place = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    mask = place < n
    g = tl.load(gradient + place, mask=mask, other=0.0)
    if CLIPPED:
        g *= tl.load(clip_factor)
    p = tl.load(w + place, mask=mask, other=0.0)
    now = rates_now(rates, step, rates_held)
    p = moved(p, g, exp_avg, exp_avg_sq, place, mask, tl.load(now), rest1, beta2, rest2, tl.load(now + 1), eps)
    tl.store(w + place, p, mask=mask)


@triton.jit
def finish(
    b_dec,
    exp_avg,
    exp_avg_sq,
    sums,
    through_encoder,
    parts,
    clip_factor,
    threshold,
    lift,
    level,
    next_level,
    penalty,
    log_target,
    search_start,
    search_stop,
    search_gain,
    rates,
    step,
    steps_done,
    flags,
    rest1,
    beta2,
    rest2,
    eps,
    rows,
    d,
    d_sae,
    active,
    losses,
    log,
    log_steps,
    rates_held,
    most_entries,
    n_dead,
    fewest_dead,
    coming_flags,
    PRE_BIAS: tl.constexpr,
    CLIPPED: tl.constexpr,
    ANNEALS: tl.constexpr,
    SEARCHES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """b_dec, λ, what is logged, and the number of steps done, which `prepare` makes the next step's number.

    With `most_entries` or more active entries this step is the last one, for now; also with `fewest_dead` dead features
    or less, for which AuxK's products have become too large.
    """
    if tl.load(flags) != 0:
        return
    at = tl.load(step)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < d
    g = tl.load(sums + column, mask=mask, other=0.0)
    if PRE_BIAS:
        total = tl.full([PARTS, COLUMNS], 0.0, tl.float32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            place = through_encoder + part[:, None] * d + column[None, :]
            total += tl.load(place, mask=(part < parts)[:, None] & mask[None, :], other=0.0)
        g += tl.sum(total, 0)
    if CLIPPED:
        g *= tl.load(clip_factor)
    p = tl.load(b_dec + column, mask=mask, other=0.0)
    now = rates_now(rates, step, rates_held)
    p = moved(p, g, exp_avg, exp_avg_sq, column, mask, tl.load(now), rest1, beta2, rest2, tl.load(now + 1), eps)
    tl.store(b_dec + column, p, mask=mask)
    if THRESHOLDS:
        highest = tl.load(next_level).to(tl.float32, bitcast=True)
        for start in range(tl.program_id(0) * FEATURES, d_sae, tl.num_programs(0) * FEATURES):
            feature = start + tl.arange(0, FEATURES)
            inside = feature < d_sae
            tl.store(lift + feature, highest - tl.load(threshold + feature, mask=inside, other=0.0), mask=inside)
        if tl.program_id(0) == 0:
            tl.store(level, highest)
    if tl.program_id(0) == 0:
        if ANNEALS:
            keep_annealed(penalty, now, losses)
        if SEARCHES:
            search(penalty, now, active, at, rows, log_target, search_start, search_stop, search_gain)
        tl.store(log + 3 * (at % log_steps), tl.load(losses))
        tl.store(log + 3 * (at % log_steps) + 1, tl.load(losses + 1))
        tl.store(log + 3 * (at % log_steps) + 2, tl.load(active).to(tl.float32))
        tl.store(steps_done, at + 1)
        # Not into `flags` here: programs of this launch that begin later would do nothing.
        dense = tl.where(tl.load(active) >= most_entries, 8, 0)
        tl.store(coming_flags, dense | tl.where(tl.load(n_dead) <= fewest_dead, 4, 0))
