"""95% intervals of means, and of ratios of means, over prompts or contexts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Z = 1.959964  # of the normal distribution


def mean_interval(values: Float[Tensor, "n ..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """mean ± 1.96 · s/√n over the first axis; infinite for a single value."""
    mean, half = values.double().mean(0), _half(values.double())
    return mean - half, mean + half


def ratio_of_means(
    over: Float[Tensor, "n ..."], under: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "..."], tuple[Float[Tensor, "..."], Float[Tensor, "..."]]]:
    """Σ over / Σ under and its interval from the linearised ratio: s(over − ratio · under) / (√n |mean under|).

    Source: Cochran 1977, "Sampling Techniques", section 2.11 (large-sample variance of a ratio estimate).
    """
    a, b = over.double(), under.double().view(-1, *[1] * (over.ndim - 1))
    ratio = a.mean(0) / b.mean(0)
    half = _half(a - ratio * b) / b.mean(0).abs()
    return ratio, (ratio - half, ratio + half)


def numbers(interval: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """An interval of one number."""
    return float(interval[0]), float(interval[1])


def _half(values: Float[Tensor, "n ..."]) -> Float[Tensor, "..."]:
    n = len(values)
    if n < 2:
        return torch.full(values.shape[1:], torch.inf, dtype=values.dtype)
    half: Tensor = values.std(0) * (Z / n**0.5)
    return half
