"""The parameters that JumpReLU and gated features have of their own: thresholds, and the gates' magnitudes."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_adam import moved
from sae.kernels.triton_step.penalty import rates_now


@triton.jit
def mean_own(own, mean, flags, d_sae, FEATURES: tl.constexpr):
    """The mean of all features' thresholds."""
    if tl.load(flags) != 0:
        return
    total = tl.full([FEATURES], 0.0, tl.float32)
    for start in range(0, d_sae, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        total += tl.load(own + feature, mask=feature < d_sae, other=0.0)
    tl.store(mean, tl.sum(total, 0) / d_sae)


@triton.jit
def own_gradients(
    own,
    b_enc,
    d_own,
    values,
    pre,
    entries,
    starts,
    counts,
    gradients,
    fired,
    bias_less,
    flags,
    d_sae,
    PENALTY: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Of a feature: how often it fires, and the gradient of its threshold ("jumps") or of r_mag and b_mag ("gates").

    `bias_less` is what reaches a gated feature's weights through its magnitude, and so not b_enc.
    """
    if tl.load(flags) != 0:
        return
    feature = tl.program_id(0).to(tl.int64)
    first, n = tl.load(starts + feature), tl.load(counts + feature)
    bias = tl.load(b_enc + feature)
    plain = tl.full([ENTRIES], 0.0, tl.float32)
    by_gate = tl.full([ENTRIES], 0.0, tl.float32)
    active = tl.full([ENTRIES], 0, tl.int32)
    for start in range(0, n, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        entry = tl.load(entries + first + i, mask=i < n, other=0)
        gradient = tl.load(d_own + entry, mask=i < n, other=0.0)
        plain += gradient
        active += (tl.load(values + entry, mask=i < n, other=0.0) > 0).to(tl.int32)
        if PENALTY == "gates":
            by_gate += gradient * (tl.load(pre + entry, mask=i < n, other=0.0) - bias)
    tl.store(fired + feature, tl.sum(active, 0))
    g = tl.sum(plain, 0)
    if PENALTY == "jumps":
        tl.store(gradients + feature, g)
    else:
        stretch = tl.exp(tl.load(own + feature))
        tl.store(bias_less + feature, g * stretch)
        tl.store(gradients + feature, tl.sum(by_gate, 0) * stretch)
        tl.store(gradients + d_sae + feature, g)


@triton.jit
def learn_own(
    own,
    exp_avg,
    exp_avg_sq,
    b_mag,
    b_exp_avg,
    b_exp_avg_sq,
    lift,
    gradients,
    clip_factor,
    rates,
    step,
    flags,
    rest1,
    beta2,
    rest2,
    eps,
    ratio,
    bandwidth,
    d_sae,
    rates_held,
    CLIPPED: tl.constexpr,
    PENALTY: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Adam's step on thresholds ("jumps"), which stay above zero, or on r_mag and b_mag ("gates")."""
    if tl.load(flags) != 0:
        return
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    mask = feature < d_sae
    now = rates_now(rates, step, rates_held)
    rate, correction = tl.load(now), tl.load(now + 1)
    factor = 1.0
    if CLIPPED:
        factor = tl.load(clip_factor)
    p = tl.load(own + feature, mask=mask, other=0.0)
    g = tl.load(gradients + feature, mask=mask, other=0.0) * factor
    if PENALTY == "jumps":
        p = moved(p, g, exp_avg, exp_avg_sq, feature, mask, rate * ratio, rest1, beta2, rest2, correction, eps)
        p = tl.where(p < 0, 0.0, p)  # a threshold that is not a number stays so
        tl.store(lift + feature, bandwidth / 2 - p, mask=mask)
    else:
        p = moved(p, g, exp_avg, exp_avg_sq, feature, mask, rate, rest1, beta2, rest2, correction, eps)
        b = tl.load(b_mag + feature, mask=mask, other=0.0)
        g = tl.load(gradients + d_sae + feature, mask=mask, other=0.0) * factor
        b = moved(b, g, b_exp_avg, b_exp_avg_sq, feature, mask, rate, rest1, beta2, rest2, correction, eps)
        tl.store(b_mag + feature, b, mask=mask)
    tl.store(own + feature, p, mask=mask)
