"""Every activation of an index in sorted order, as the panels read it, and how they draw samples from it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int


@runtime_checkable
class Firings(Protocol):
    """Every activation of an index, sorted by feature and by token row; `store.feature_sort.SortedFirings` is one.

    Feature f fires on `rows[ptr[f] : ptr[f + 1]]` (ascending) with `values` there. On row r fire the features
    `row_features[row_ptr[r] : row_ptr[r + 1]]` with `row_values`. Row r is position `r % seq_len` of context
    `r // seq_len`. `tokens`, `keep` and `domain` (number of the document's domain, -1: padding) are
    [n_contexts, seq_len].
    """

    @property
    def ptr(self) -> np.ndarray: ...
    @property
    def rows(self) -> np.ndarray: ...
    @property
    def values(self) -> np.ndarray: ...
    @property
    def row_ptr(self) -> np.ndarray: ...
    @property
    def row_features(self) -> np.ndarray: ...
    @property
    def row_values(self) -> np.ndarray: ...
    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def keep(self) -> np.ndarray: ...
    @property
    def domain(self) -> np.ndarray: ...


def rows_of(firings: Firings, feature: int) -> Int[np.ndarray, " n"]:
    """The token rows on which a feature fires, ascending."""
    start, stop = int(firings.ptr[feature]), int(firings.ptr[feature + 1])
    return np.asarray(firings.rows[start:stop]).astype(np.int64)


def next_token_is_kept(firings: Firings, rows: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether each row is followed by a kept token of the same context."""
    seq_len = firings.keep.shape[1]
    found = rows % seq_len < seq_len - 1
    found[found] = firings.keep.reshape(-1)[rows[found] + 1]
    return np.asarray(found)


def systematic_sample(n: int, most: int, rng: np.random.Generator) -> Int[np.ndarray, " sampled"]:
    """At most `most` of the numbers 0 … n−1, ascending and evenly spaced; each has the same chance to be drawn.

    The spacing is fixed and the start is random (systematic sampling).
    """
    if n <= most:
        return np.arange(n)
    return np.minimum(((np.arange(most) + rng.random()) * n / most).astype(np.int64), n - 1)
