"""The feature activations of a batch, sparse or dense, behind one interface that losses use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels import autograd, choose, dense, fastest
from sae.kernels.autograd import Kernels
from sae.kernels.sparsity import NotSparse, PreparedEncoder, Rule, Support


@dataclass(frozen=True)
class SparseActs:
    """Activations of the active features only: `values [nnz]` on a support."""

    values: Float[Tensor, " nnz"]
    support: Support
    kernels: Kernels

    @classmethod
    def pre_activations(
        cls,
        kernels: Kernels,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_in"],
        rule: Rule,
        prepared: PreparedEncoder | None = None,
    ) -> SparseActs:
        """`(x − b_dec) W_enc + b_enc` of the active features. Raises: NotSparse if there are too many."""
        pre, support = autograd.encode(kernels, x, W_enc, b_enc, b_dec, rule, prepared)
        return cls(pre, support, kernels)

    @property
    def n_rows(self) -> int:
        return self.support.n_rows

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "rows d_in"]:
        return autograd.decode(self.kernels, self.values, self.support, W_dec)

    def total(self) -> Float[Tensor, ""]:
        """The sum of all activations."""
        return self.values.sum()

    def n_active(self) -> Int[Tensor, ""]:
        return (self.values.detach() > 0).sum()

    def of_feature(self, vector: Float[Tensor, " d_sae"]) -> Float[Tensor, " nnz"]:
        """The element of a per-feature vector for each entry."""
        return vector[self.support.features.long()]

    def with_values(self, values: Float[Tensor, " nnz"]) -> SparseActs:
        """Other values on the same support."""
        return SparseActs(values, self.support, self.kernels)

    def prefix(self, start: int, stop: int) -> SparseActs:
        """Only the features start … stop − 1."""
        features = self.support.features
        return self.where((features >= start) & (features < stop))

    def fired(self) -> Bool[Tensor, " d_sae"]:
        # Entries at zero mark an extra feature d_sae: filtering them out would synchronise with the GPU.
        d_sae = self.support.d_sae
        found = torch.zeros(d_sae + 1, dtype=torch.bool, device=self.values.device)
        found[self.support.features.long().masked_fill(self.values.detach() <= 0, d_sae)] = True
        return found[:d_sae]

    def dense(self) -> Float[Tensor, "rows d_sae"]:
        return self.support.dense(self.values)

    def sparse(self) -> SparseActs:
        return self

    def to(self, device: str | torch.device) -> SparseActs:
        """The same on another device, with the fastest kernels there."""
        if torch.device(device) == self.values.device:
            return self
        support = Support(self.support.features.to(device), self.support.offsets.to(device), self.support.d_sae)
        return SparseActs(self.values.to(device), support, fastest(device))

    def where(self, kept: Bool[Tensor, " nnz"]) -> SparseActs:
        """Only the activations for which `kept` is true."""
        return SparseActs(self.values[kept], self.support.where(kept), self.kernels)

    def firings(self, kept: Bool[Tensor, " rows"]) -> SparseActs:
        """Only the activations above zero in the rows that are kept."""
        return self.where(kept[self.support.rows] & (self.values > 0))

    def largest_of_rows(self, k: int) -> SparseActs:
        """Only the k largest of each row."""
        support = self.support
        width = int(support.offsets.diff().max())
        places = torch.arange(len(self.values), device=self.values.device) - support.offsets[support.rows]
        padded = self.values.new_full((self.n_rows, width), -torch.inf)
        padded[support.rows, places] = self.values.detach()
        kept = torch.zeros_like(padded, dtype=torch.bool)
        kept.scatter_(-1, padded.topk(min(k, width), dim=-1, sorted=False).indices, True)
        return self.where(kept[support.rows, places])


@dataclass(frozen=True)
class DenseActs:
    """Activations as the matrix `values [rows, d_sae]`: cheaper while many features are active.

    `sums` over rows and the number of `active` entries are set if the computation of the values counted them.
    """

    values: Float[Tensor, "rows d_sae"]
    sums: Float[Tensor, " d_sae"] | None = None
    active: Int[Tensor, ""] | None = None

    @property
    def n_rows(self) -> int:
        return len(self.values)

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "rows d_in"]:
        return dense.decode(self.values, W_dec)

    def total(self) -> Float[Tensor, ""]:
        """The sum of all activations."""
        return self.values.sum() if self.sums is None else self.sums.sum()

    def n_active(self) -> Int[Tensor, ""]:
        # Rows in float32, because PyTorch's sum of booleans is slow; all rows may have more entries than it can count.
        return (self.values.detach() > 0).float().sum(-1).long().sum() if self.active is None else self.active

    def of_feature(self, vector: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        return vector

    def with_values(self, values: Float[Tensor, "rows d_sae"]) -> DenseActs:
        return DenseActs(values)

    def prefix(self, start: int, stop: int) -> DenseActs:
        outside = torch.ones(self.values.shape[1], dtype=torch.bool, device=self.values.device)
        outside[start:stop] = False
        return DenseActs(self.values.masked_fill(outside, 0.0))

    def fired(self) -> Bool[Tensor, " d_sae"]:
        return (self.values.detach() > 0).any(0) if self.sums is None else self.sums.detach() > 0

    def sparse(self) -> SparseActs:
        """The positive entries only, without gradients."""
        active = self.values.detach() > 0
        return SparseActs(self.values.detach()[active], Support.of(active), choose(device=self.values.device))

    def largest_of_rows(self, k: int) -> DenseActs:
        values, features = self.values.topk(k, dim=-1, sorted=False)
        return DenseActs(torch.zeros_like(self.values).scatter(-1, features, values))


FeatureActs = SparseActs | DenseActs


def sparse_or_dense(sparse: Callable[[], SparseActs], dense: Callable[[], DenseActs]) -> FeatureActs:
    """`sparse()`, or `dense()` where the sparse kernels refuse the batch (NotSparse): the one place that falls back."""
    try:
        return sparse()
    except NotSparse:
        return dense()


def l0(acts: FeatureActs) -> Float[Tensor, ""]:
    """Active features per row, mean over the batch."""
    return acts.n_active() / acts.n_rows
