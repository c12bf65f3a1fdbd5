"""How similar two dictionaries' features are on the same tokens: Pearson and masked cosine, from exact float64 sums.

Both are sparse matrices [tokens, features]. The cost follows the number of feature pairs that fire together; memory
holds a slice of A's features against all features of B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy import sparse
from torch import Tensor

from sae.indexing.correlation import Moments, RunningCorrelation, pearson

PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class FeatureMoments:
    """Statistics of each feature over the tokens: number of firings, mean and standard deviation, Σ f²."""

    tokens: int
    firings: Int[np.ndarray, " features"]
    moments: Moments
    square_sums: Float64[np.ndarray, " features"]

    @classmethod
    def of(cls, acts: sparse.csr_array) -> FeatureMoments:
        tokens, features = acts.shape
        values = acts.data.astype(np.float64)
        # float64 also without any activation: numpy's counts of an empty array are integers
        sums = np.bincount(acts.indices, values, minlength=features).astype(np.float64)
        square_sums = np.bincount(acts.indices, values**2, minlength=features).astype(np.float64)
        firings = np.bincount(acts.indices, minlength=features)
        return cls(tokens, firings, Moments.of_sums(tokens, sums, square_sums), square_sums)


@dataclass(frozen=True)
class PairBlock:
    """Statistics of the pairs of A's features from `start` on with every feature of B.

    `masked_a` is the cosine over the tokens where A's feature fires, `masked_b` over those where B's does.
    """

    start: int
    pearson: Float64[np.ndarray, "n n_b"]
    masked_a: Float64[np.ndarray, "n n_b"] | None
    masked_b: Float64[np.ndarray, "n n_b"] | None

    @property
    def features(self) -> slice:
        """The features of A in this block."""
        return slice(self.start, self.start + len(self.pearson))


def pair_blocks(a: sparse.csr_array, b: sparse.csr_array, *, masked: bool = False) -> Iterator[PairBlock]:
    """Statistics of every pair of features, in slices of A's features.

    pearson = cov(f, g) / (σ_f σ_g), 0 where either is constant;
    masked_a = Σ_{t: f>0} f g / √(Σ f² · Σ_{t: f>0} g²), masked_b likewise.
    Raises: ValueError when the two matrices have different numbers of tokens.
    Source: Bricken et al. 2023, "Universality" and "Feature splitting" (masked cosine similarity).
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"comparison: expected the same tokens for both dictionaries, got {a.shape[0]:,} tokens of one, "
            f"{b.shape[0]:,} of the other."
        )
    of_a, of_b = FeatureMoments.of(a), FeatureMoments.of(b)
    by_feature = a.tocsc()
    g = b.astype(np.float64)
    g_squared, g_fires = _with_values(g, g.data**2), _with_values(g, np.ones_like(g.data))
    at_once = max(1, PAIRS_AT_ONCE // max(1, b.shape[1]))
    for start in range(0, a.shape[1], at_once):
        f = by_feature[:, start : start + at_once].astype(np.float64).T.tocsr()  # [features, tokens]
        here = slice(start, start + f.shape[0])
        products = (f @ g).toarray()
        masked_a = masked_b = None
        if masked:
            f_fires, f_squared = _with_values(f, np.ones_like(f.data)), _with_values(f, f.data**2)
            masked_a = _cosine(products, (f_fires @ g_squared).toarray() * of_a.square_sums[here, None])
            masked_b = _cosine(products, (f_squared @ g_fires).toarray() * of_b.square_sums)
        moments = Moments(of_a.moments.mean[here], of_a.moments.std[here])
        yield PairBlock(start, pearson(products, a.shape[0], moments, of_b.moments), masked_a, masked_b)


def _with_values(matrix: sparse.csr_array, values: Float64[np.ndarray, " nnz"]) -> sparse.csr_array:
    """The same sparsity pattern with other values."""
    return sparse.csr_array((values, matrix.indices, matrix.indptr), shape=matrix.shape)


def _cosine(
    products: Float64[np.ndarray, "n n_b"], square_products: Float64[np.ndarray, "n n_b"]
) -> Float64[np.ndarray, "n n_b"]:
    """products / √square_products; 0 where that is 0 / 0."""
    positive = square_products > 0
    cosine = np.divide(products, np.sqrt(square_products), out=np.zeros_like(products), where=positive)
    return np.asarray(np.clip(cosine, 0, 1))


class NeuronCorrelation(RunningCorrelation):
    """Pearson correlation of each neuron of one model with each neuron of the other."""

    def add(self, x_a: Float[Tensor, "rows d_a"], x_b: Float[Tensor, "rows d_b"]) -> None:
        """Adds rows of the same tokens."""
        x_a, x_b = x_a.double(), x_b.double()
        self.n += len(x_a)
        self.products += x_a.T @ x_b
        self.sums_a += x_a.sum(0)
        self.square_sums_a += x_a.pow(2).sum(0)
        self.sums_b += x_b.sum(0)
        self.square_sums_b += x_b.pow(2).sum(0)
