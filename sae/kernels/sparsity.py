"""Which features are active in which rows, and the rules that decide it."""

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
    """The k · rows largest of the batch among positive pre-activations, each ranked with its feature's `lift` added.

    Source: Bussmann et al. 2024 (arXiv 2412.06410); the lift, which changes who is chosen and no value, is the bias of
    Wang et al. 2024 (arXiv 2408.15664) for experts.
    """

    k: int
    lift: Float[Tensor, " d_sae"] | None = None  # none: zero

    def lifts(self, like: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        return torch.zeros_like(like) if self.lift is None else self.lift

    def rank(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """What the entries are chosen by; zero for those that cannot be."""
        return pre.relu() if self.lift is None else torch.where(pre > 0, pre + self.lift, 0.0)


@dataclass(frozen=True)
class Above:
    """Every pre-activation above `threshold [d_sae]`: zeros for ReLU."""

    threshold: Float[Tensor, " d_sae"]


Rule = TopK | BatchTopK | Above


class NotSparse(RuntimeError):
    """The sparse path is not for this batch: too many features are active, or something is not finite."""


class ByFeature(NamedTuple):
    """The same entries feature by feature: entry numbers, their rows, and where each feature's entries begin."""

    entries: Int[Tensor, " nnz"]
    rows: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " d_sae+1"]


@dataclass(frozen=True, eq=False)
class Support:
    """The active (row, feature) pairs, row by row: row i has `features[offsets[i] : offsets[i + 1]]`.

    Shapes: features [nnz] int32, offsets [rows + 1] int64. Values that belong to it are vectors [nnz].
    """

    features: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " rows_and_one"]
    d_sae: int

    @classmethod
    def of(cls, active: Bool[Tensor, "rows d_sae"]) -> Support:
        """The pairs for which the boolean matrix is true."""
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
        offsets = torch.searchsorted(ordered, numbers)  # unlike bincount, never waits for a GPU
        return ByFeature(entries.int(), self.rows[entries].int(), offsets)

    def where(self, kept: Tensor) -> Support:
        """Only the entries for which the boolean vector `kept [nnz]` is true."""
        before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
        return Support(self.features[kept], before[self.offsets], self.d_sae)

    def dense(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, "rows d_sae"]:
        """The dense matrix these values stand for."""
        out = values.new_zeros((self.n_rows, self.d_sae))
        return out.index_put((self.rows, self.features.long()), values)
