"""Which features are active in which rows, the rules that decide it, and the encoder that backends decide with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """The k largest positive pre-activations of each row. Source: Gao et al. 2024 (arXiv 2406.04093), §2.3."""

    k: int


@dataclass(frozen=True)
class BatchTopK:
    """The k · rows largest positive pre-activations of the batch, ranked by pre-activation + `lift` of the feature.

    The lift changes which entries are chosen and no value.
    Source: Bussmann et al. 2024 (arXiv 2412.06410); the lift is the expert bias of Wang et al. 2024 (arXiv 2408.15664).
    """

    k: int
    lift: Float[Tensor, " d_sae"] | None = None  # None means zero

    def lifts(self, like: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        return torch.zeros_like(like) if self.lift is None else self.lift

    def rank(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """The values that entries are ranked by; zero for entries that cannot be chosen."""
        return pre.relu() if self.lift is None else torch.where(pre > 0, pre + self.lift, 0.0)


@dataclass(frozen=True)
class Above:
    """Every pre-activation above its feature's `threshold`; a threshold of zero is ReLU."""

    threshold: Float[Tensor, " d_sae"]


Rule = TopK | BatchTopK | Above


class NotSparse(RuntimeError):
    """Sparse kernels refuse this batch: too many features are active, or a number is not finite."""


@dataclass(frozen=True, eq=False)
class PreparedEncoder:
    """An encoder in the form that one backend selects with, made by that backend's `prepare(W_enc)`.

    Valid while W_enc does not change; nothing checks that. A training step prepares its own. A frozen dictionary that
    reads many batches prepares once: `sae.dictionary.inference.FrozenSAE` holds it.
    """

    W_enc: Float[Tensor, "d_in d_sae"]


class ByFeature(NamedTuple):
    """The entries of a support sorted by feature: feature i has `entries[offsets[i] : offsets[i + 1]]`, in `rows`."""

    entries: Int[Tensor, " nnz"]
    rows: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " d_sae+1"]


@dataclass(frozen=True, eq=False)
class Support:
    """The active (row, feature) pairs, row by row: row i has `features[offsets[i] : offsets[i + 1]]`.

    Shapes: features [nnz] int32, offsets [rows + 1] int64. Values on a support are vectors [nnz].
    """

    features: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " rows_and_one"]
    d_sae: int

    @classmethod
    def of(cls, active: Bool[Tensor, "rows d_sae"]) -> Support:
        """The pairs where the boolean matrix is true."""
        offsets = torch.nn.functional.pad(active.sum(-1).cumsum(0), (1, 0))
        return cls(active.nonzero()[:, 1].int(), offsets, active.shape[1])

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " nnz"]:
        """The row of each entry."""
        numbers = torch.arange(self.n_rows, device=self.offsets.device)
        return numbers.repeat_interleave(self.offsets.diff(), output_size=len(self.features))

    @cached_property
    def by_feature(self) -> ByFeature:
        """The entries sorted by feature, rows ascending within each."""
        ordered, entries = self.features.sort(stable=True)
        numbers = torch.arange(self.d_sae + 1, dtype=torch.int32, device=ordered.device)
        offsets = torch.searchsorted(ordered, numbers)  # bincount would synchronise with the GPU
        return ByFeature(entries.int(), self.rows[entries].int(), offsets)

    def where(self, kept: Bool[Tensor, " nnz"]) -> Support:
        """Only the entries where `kept` is true."""
        before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
        return Support(self.features[kept], before[self.offsets], self.d_sae)

    def dense(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, "rows d_sae"]:
        """The values as a matrix, zero elsewhere."""
        out = values.new_zeros((self.n_rows, self.d_sae))
        return out.index_put((self.rows, self.features.long()), values)
