"""Directions: unit rows, and each row's nearest in another dictionary."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

DIRECTIONS_AT_ONCE = 512


class Best(NamedTuple):
    """For each row of the first the best of the second, and for each of the second the best of the first."""

    of_a: np.ndarray
    cosine_a: np.ndarray
    of_b: np.ndarray
    cosine_b: np.ndarray


def unit(directions: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows at unit norm; a zero row stays zero."""
    return directions / directions.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def best_cosines(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Best:
    """The largest cosine each way, slice by slice."""
    a, b = unit(a.float()), unit(b.float())
    of_a, cosine_a = [], []
    cosine_b = torch.full((len(b),), -2.0)
    of_b = torch.zeros(len(b), dtype=torch.int64)
    for start in range(0, len(a), DIRECTIONS_AT_ONCE):
        cosines = a[start : start + DIRECTIONS_AT_ONCE] @ b.T
        values, ids = cosines.max(1)
        of_a.append(ids)
        cosine_a.append(values)
        values, ids = cosines.max(0)
        better = values > cosine_b
        cosine_b, of_b = torch.where(better, values, cosine_b), torch.where(better, ids + start, of_b)
    return Best(torch.cat(of_a).numpy(), torch.cat(cosine_a).numpy(), of_b.numpy(), cosine_b.numpy())
