"""Directions: unit rows, each row's nearest neighbours, and rows that are far from each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

DIRECTIONS_AT_ONCE = 512
ROWS_DRAWN_AT_ONCE = 128


class Best(NamedTuple):
    """For each row of A its nearest row of B and their cosine; for each row of B its nearest row of A."""

    of_a: np.ndarray
    cosine_a: np.ndarray
    of_b: np.ndarray
    cosine_b: np.ndarray


def unit(directions: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows at unit norm; a zero row stays zero."""
    norms: Tensor = directions.norm(dim=-1, keepdim=True)
    return directions / norms.clamp_min(1e-12)


def best_cosines(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Best:
    """The nearest row in the other set, in both directions; computed in slices of A."""
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


def cosines_with_others(unit_rows: Float[Tensor, "n d"], rows: Int[Tensor, " k"]) -> Float[Tensor, "k n"]:
    """Cosines of the chosen unit rows with every row; below −1 (never the nearest) for a row with itself."""
    cosines = unit_rows[rows] @ unit_rows.T
    cosines[torch.arange(len(rows)), rows] = -2.0
    return cosines


def head_shares(W_dec: Float[Tensor, "d_sae d_in"], n_heads: int) -> Float[Tensor, "d_sae head"]:
    """Share of each head in a decoder row of a dictionary of head outputs: ‖W_dec[head]‖ / Σ over heads of ‖…‖.

    Source: Kissane et al. 2024, "Interpreting attention layer outputs with sparse autoencoders" (weight-based head
    attribution).
    """
    norms: Tensor = W_dec.view(len(W_dec), n_heads, -1).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-12)


def spread_rows(directions: Float[Tensor, "n d"], count: int, generator: torch.Generator) -> Int[Tensor, " chosen"]:
    """Numbers of up to `count` unit rows that are far from each other: k-means++ seeding.

    Each row is drawn with P ∝ its cosine distance to the nearest row chosen so far; a zero row is never drawn. The
    result is shorter than `count` when no row is left at a distance above 0.
    Source: k-means++ (Arthur and Vassilvitskii 2007).
    """
    # Many rows are drawn at once from the same distances. A drawn row is accepted with the probability that its
    # distance has not shrunk since, which gives the same distribution as drawing one row at a time. Products are
    # computed where the directions are; what is drawn, by the generator of the host.
    distance = directions.norm(dim=-1).double().cpu()  # 1 for every row, 0 for a zero row
    chosen: list[int] = []
    while len(chosen) < count and distance.sum() > 0:
        drawn = torch.multinomial(distance, ROWS_DRAWN_AT_ONCE, replacement=True, generator=generator)
        between = (1 - directions[drawn] @ directions[drawn].T).clamp_min(0).double().cpu()
        between[drawn[:, None] == drawn] = 0.0
        bars = torch.rand(len(drawn), generator=generator, dtype=torch.float64) * distance[drawn]
        taken: list[int] = []
        for i in range(len(drawn)):
            if len(chosen) + len(taken) < count and (not taken or between[i, taken].min() > bars[i]):
                taken.append(i)
        rows = drawn[taken]
        chosen += rows.tolist()
        nearest = (1 - directions @ directions[rows].T).amin(1).clamp_min(0).double().cpu()
        distance = torch.minimum(distance, nearest)
        distance[rows] = 0
    return torch.tensor(chosen, dtype=torch.long)
