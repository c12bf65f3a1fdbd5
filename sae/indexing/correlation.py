"""Pearson correlation from running sums: one formula, and one rule for columns that do not vary."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sae.kernels.activations import SparseActs

ROUNDING = 1e-9  # a variance at or below this share of the mean square is rounding error: the column is constant
NEURONS = 10
ROWS_AT_ONCE = 1024  # rows converted to float64 at once: few enough to stay in the processor's cache


class Moments(NamedTuple):
    """Mean and standard deviation of each column; the standard deviation of a constant column is exactly 0."""

    mean: Float64[np.ndarray, " columns"]
    std: Float64[np.ndarray, " columns"]

    @classmethod
    def of_sums(
        cls, n: int, sums: Float64[np.ndarray, " columns"], square_sums: Float64[np.ndarray, " columns"]
    ) -> Moments:
        """From Σ x and Σ x² over n rows."""
        return cls.of_means(sums / max(1, n), square_sums / max(1, n))

    @classmethod
    def of_means(cls, mean: Float64[np.ndarray, " columns"], mean_square: Float64[np.ndarray, " columns"]) -> Moments:
        """From E[x] and E[x²]."""
        variance = mean_square - mean**2
        return cls(mean, np.sqrt(np.where(variance > ROUNDING * mean_square, variance, 0.0)))


def pearson(products: Float64[np.ndarray, "n_a n_b"], n: int, a: Moments, b: Moments) -> Float64[np.ndarray, "n_a n_b"]:
    """`(E[x y] − E[x] E[y]) / (σ_x σ_y)` for each column x of a and y of b; 0 where either is constant.

    `products` are the sums Σ x y over n rows.
    """
    covariance = products / max(1, n) - np.outer(a.mean, b.mean)
    scale = np.outer(a.std, b.std)
    return np.clip(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0), -1, 1)


class RunningCorrelation:
    """Pearson correlation of every column of a with every column of b; subclasses add rows to the float64 sums."""

    def __init__(self, n_a: int, n_b: int) -> None:
        self.n = 0
        self.products = torch.zeros(n_a, n_b, dtype=torch.float64)
        self.sums_a, self.square_sums_a = (torch.zeros(n_a, dtype=torch.float64) for _ in range(2))
        self.sums_b, self.square_sums_b = (torch.zeros(n_b, dtype=torch.float64) for _ in range(2))

    def matrix(self) -> Float64[np.ndarray, "n_a n_b"]:
        """The correlations over all rows added so far; 0 where either column is constant."""
        a = Moments.of_sums(self.n, self.sums_a.numpy(), self.square_sums_a.numpy())
        b = Moments.of_sums(self.n, self.sums_b.numpy(), self.square_sums_b.numpy())
        return pearson(self.products.numpy(), self.n, a, b)


class FeatureNeuronCorrelation(RunningCorrelation):
    """Pearson correlation of each feature's activation with each neuron of x, over the kept rows."""

    BYTES = 12  # of memory for each pair of a feature and a neuron

    def add(self, acts: SparseActs, x: Float[Tensor, "rows d_in"], kept: Bool[Tensor, " rows"]) -> None:
        """Adds the kept rows; `acts` holds activations of kept rows only."""
        self.n += int(kept.sum())
        products = torch.zeros(self.products.shape)
        acts.kernels.add_by_feature_(products, acts.values, acts.support, x)
        self.products += products
        features, values = acts.support.features.long(), acts.values.double()
        self.sums_a.index_add_(0, features, values)
        self.square_sums_a.index_add_(0, features, values**2)
        for start in range(0, len(x), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            wide_x = x[part][kept[part]].double()
            self.sums_b += wide_x.sum(0)
            self.square_sums_b += wide_x.pow(2).sum(0)

    def panels(self) -> dict[str, np.ndarray]:
        """The `NEURONS` most correlated neurons of each feature: `neurons/corr_id`, `neurons/corr_value`."""
        correlations = torch.from_numpy(self.matrix()).float()
        values, ids = correlations.topk(min(NEURONS, correlations.shape[1]), dim=-1)
        return {"neurons/corr_id": ids.int().numpy(), "neurons/corr_value": values.numpy()}
