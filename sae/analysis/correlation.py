"""How alike two dictionaries' features are on the same tokens: Pearson and masked cosine, from exact float64 sums.

Both are sparse matrices [tokens, features]; the cost follows the pairs that fire together, and memory a slice of the
features of the first against all of the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

PAIRS_AT_ONCE = 1 << 22
ROUNDING = 1e-9  # a variance below this share of the mean square is rounding


@dataclass(frozen=True)
class Moments:
    """Firings, mean, standard deviation and Σ f² of each feature over the tokens; float64 [features]."""

    tokens: int
    firings: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    square_sum: np.ndarray

    @classmethod
    def of(cls, acts: sparse.csr_array) -> Moments:
        tokens, features = max(1, acts.shape[0]), acts.shape[1]
        values = acts.data.astype(np.float64)
        sums = np.bincount(acts.indices, values, minlength=features)
        squares = np.bincount(acts.indices, values**2, minlength=features)
        variance = squares / tokens - (sums / tokens) ** 2
        std = np.sqrt(np.where(variance > ROUNDING * squares / tokens, variance, 0.0))
        return cls(acts.shape[0], np.bincount(acts.indices, minlength=features), sums / tokens, std, squares)


@dataclass(frozen=True)
class PairBlock:
    """Features start … of the first against all of the second; each array [features, features of the second].

    `masked_a` is the cosine over the tokens where the first's feature fires, `masked_b` where the second's does.
    """

    start: int
    pearson: np.ndarray
    masked_a: np.ndarray | None
    masked_b: np.ndarray | None


def pair_blocks(a: sparse.csr_array, b: sparse.csr_array, *, masked: bool = False) -> Iterator[PairBlock]:
    """Every pair's statistics, slice by slice of a's features.

    pearson = cov(f, g) / (σ_f σ_g), 0 where either never varies;
    masked_a = Σ_{t: f>0} f g / √(Σ f² · Σ_{t: f>0} g²), masked_b likewise.
    Raises: ValueError when the two are not of the same tokens.
    Source: Bricken et al. 2023, "Universality" and "Feature splitting" (masked cosine similarity).
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"comparison: {a.shape[0]:,} tokens of one, {b.shape[0]:,} of the other; they must be equal.")
    of_a, of_b = Moments.of(a), Moments.of(b)
    by_feature = a.tocsc()
    wide = b.astype(np.float64)
    squared, fired = _with_values(wide, wide.data**2), _with_values(wide, np.ones_like(wide.data))
    at_once = max(1, PAIRS_AT_ONCE // max(1, b.shape[1]))
    for start in range(0, a.shape[1], at_once):
        part = by_feature[:, start : start + at_once].astype(np.float64).T.tocsr()  # [features, tokens]
        products = (part @ wide).toarray()
        here = slice(start, start + part.shape[0])
        masked_a = masked_b = None
        if masked:
            b_where_a = _with_values(part, np.ones_like(part.data)) @ squared  # Σ_{t: f>0} g²
            a_where_b = _with_values(part, part.data**2) @ fired  # Σ_{t: g>0} f²
            masked_a = _cosine(products, b_where_a.toarray() * of_a.square_sum[here, None])
            masked_b = _cosine(products, a_where_b.toarray() * of_b.square_sum)
        yield PairBlock(start, _pearson(products, of_a, of_b, here), masked_a, masked_b)


def _with_values(matrix: sparse.csr_array, values: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array((values, matrix.indices, matrix.indptr), shape=matrix.shape)


def _pearson(products: np.ndarray, a: Moments, b: Moments, here: slice) -> np.ndarray:
    covariance = products / max(1, a.tokens) - np.outer(a.mean[here], b.mean)
    scale = np.outer(a.std[here], b.std)
    return np.clip(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0), -1, 1)


def _cosine(products: np.ndarray, squares: np.ndarray) -> np.ndarray:
    found = np.divide(products, np.sqrt(squares), out=np.zeros_like(products), where=squares > 0)
    return np.clip(found, 0, 1)


class NeuronPairs:
    """Pearson correlation of each neuron of one model with each of the other, from running float64 sums."""

    def __init__(self, d_a: int, d_b: int) -> None:
        self.n = 0
        self.products = torch.zeros(d_a, d_b, dtype=torch.float64)
        self.sums = [torch.zeros(d, 2, dtype=torch.float64) for d in (d_a, d_b)]  # Σ x, Σ x²

    def add(self, x_a: Float[Tensor, "rows d_a"], x_b: Float[Tensor, "rows d_b"]) -> None:
        x_a, x_b = x_a.double(), x_b.double()
        self.n += len(x_a)
        self.products += x_a.T @ x_b
        for total, x in zip(self.sums, (x_a, x_b), strict=True):
            total += torch.stack([x.sum(0), x.pow(2).sum(0)], -1)

    def matrix(self) -> np.ndarray:
        n = max(1, self.n)
        means = [total[:, 0] / n for total in self.sums]
        variances = [total[:, 1] / n - mean**2 for total, mean in zip(self.sums, means, strict=True)]
        std = [
            torch.where(v > 1e-9 * t[:, 1] / n, v, 0.0).sqrt() for v, t in zip(variances, self.sums, strict=True)
        ]  # a constant neuron has none
        scale = torch.outer(std[0], std[1])
        covariance = self.products / n - torch.outer(means[0], means[1])
        return torch.where(scale > 0, covariance / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1, 1).numpy()
