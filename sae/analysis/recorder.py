"""The activations of one dictionary on a bounded sample of tokens, as a scipy matrix."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from sae.kernels.activations import FeatureActs


class Recorder:
    """Collects feature activations block by block. Rows that are not kept are left out: row r is the r-th kept token.

    Memory: 8 bytes per activation.
    """

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self._features: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._per_row: list[np.ndarray] = []

    def add(self, acts: FeatureActs, kept: Bool[Tensor, " rows"]) -> None:
        found = acts.sparse()
        self.add_entries(found.support.features, found.values, found.support.rows, kept)

    def add_entries(
        self,
        features: Int[Tensor, " n"],
        values: Float[Tensor, " n"],
        rows: Int[Tensor, " n"],
        kept: Bool[Tensor, " rows"],
    ) -> None:
        """The same as `add`, from (feature, value, row) entries in the order of their rows."""
        counted = kept[rows] & (values > 0)
        self._features.append(features[counted].cpu().numpy().astype(np.int32))
        self._values.append(values[counted].float().cpu().numpy())
        self._per_row.append(torch.bincount(rows[counted], minlength=len(kept))[kept].cpu().numpy())

    @property
    def recorded(self) -> int:
        """The number of activations held in memory."""
        return sum(len(values) for values in self._values)

    def matrix(self) -> sparse.csr_array:
        """The positive activations as [kept tokens, d_sae], float32."""
        per_row = np.concatenate([np.empty(0, np.int64), *self._per_row])
        pointers = np.concatenate([[0], np.cumsum(per_row)])
        values = np.concatenate([np.empty(0, np.float32), *self._values])
        features = np.concatenate([np.empty(0, np.int32), *self._features])
        return sparse.csr_array((values, features, pointers), shape=(len(per_row), self.d_sae))
