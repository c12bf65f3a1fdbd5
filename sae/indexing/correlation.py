"""Pearson correlation of features with neurons, in one pass."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels.activations import SparseActs

NEURONS = 10
ROWS_AT_ONCE = 1024  # in float64: few enough to stay in the cache


class Correlation:
    """Pearson correlation of each feature with each neuron of x, from running float64 sums."""

    def __init__(self, d_sae: int, d_in: int) -> None:
        self.n = 0
        self.products = torch.zeros(d_sae, d_in, dtype=torch.float64)
        self.f, self.ff = (torch.zeros(d_sae, dtype=torch.float64) for _ in range(2))
        self.x, self.xx = (torch.zeros(d_in, dtype=torch.float64) for _ in range(2))

    def add(self, acts: SparseActs, x: Float[Tensor, "rows d_in"], kept: Bool[Tensor, " rows"]) -> None:
        """Rows and the activations of the kept ones among them."""
        self.n += int(kept.sum())
        products = torch.zeros(self.products.shape)
        acts.kernels.add_by_feature_(products, acts.values, acts.support, x)
        self.products += products
        features, wide = acts.support.features.long(), acts.values.double()
        self.f.index_add_(0, features, wide)
        self.ff.index_add_(0, features, wide**2)
        for part, counted in zip(x.split(ROWS_AT_ONCE), kept.split(ROWS_AT_ONCE), strict=True):
            wide_x = part[counted].double()
            self.x += wide_x.sum(0)
            self.xx += wide_x.pow(2).sum(0)

    def matrix(self) -> Float[Tensor, "d_sae d_in"]:
        """`cov(f, x) / (σ_f σ_x)`; 0 where either never varies."""
        n = max(1, self.n)
        covariance = self.products / n - torch.outer(self.f / n, self.x / n)
        scale = torch.outer(_std(self.f / n, self.ff / n), _std(self.x / n, self.xx / n))
        varies = scale > 0
        return torch.where(varies, covariance / torch.where(varies, scale, 1.0), 0.0).clamp(-1, 1).float()

    def panels(self) -> dict[str, np.ndarray]:
        values, ids = self.matrix().topk(min(NEURONS, len(self.x)), dim=-1)
        return {"neurons/corr_id": ids.int().numpy(), "neurons/corr_value": values.numpy()}


def _std(mean: Tensor, mean_square: Tensor) -> Tensor:
    """Standard deviations; 0 where the variance is no more than the rounding of its two terms."""
    variance = mean_square - mean**2
    return torch.where(variance > 1e-9 * mean_square, variance, 0.0).sqrt()
