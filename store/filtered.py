"""A store seen through a dictionary's row filter: rows that it leaves out are not kept.

Everything else is the store's own: contexts, tokens, activations and their numbers. So whatever reads kept rows
(training, evaluation, index, controls) reads those of the filter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from store.activation_reader import ActivationReader, Contexts
from store.common import TRAIN, RowFilter, StoreError
from store.schema import decode
from store.shards import Marker, kept_sums

MEDIAN_SHARDS = 64  # whose kept rows give the median norm
Watch = Callable[[Collection[int]], Iterator[int]]


class FilteredStore(ActivationReader):
    """A store whose kept rows are those that `row_filter` does not leave out.

    The first use of a split reads its tokens and the activations of the filter's hook points once; only for these hook
    points are there `totals`. `watch` gets the shards that are read, e.g. to show progress.
    """

    def __init__(
        self, store: ActivationReader, row_filter: RowFilter, hook_points: Iterable[str], watch: Watch = iter
    ) -> None:
        super().__init__(store.place, store.attributes)
        self.whole, self.row_filter, self._filtered_hooks, self._watch = store, row_filter, list(hook_points), watch
        self._found: dict[str, dict[int, Marker]] = {}
        self._keep_bits: dict[tuple[str, int], np.ndarray] = {}

    def fingerprint(self, split: str) -> str:
        return self.whole.fingerprint(split)

    def markers(self, split: str) -> dict[int, Marker]:
        """As of the store, with kept rows and sums of the rows that the filter does not leave out."""
        if split not in self._found:
            there = self.whole.markers(split)
            self._found[split] = {shard: self._filtered(split, there[shard]) for shard in self._watch(there)}
        return self._found[split]

    def read_contexts(self, split: str, shard: int) -> Contexts:
        return replace(self.whole.read_contexts(split, shard), keep=self.read_keep(split, shard))

    def read_keep(self, split: str, shard: int) -> np.ndarray:
        marker = self.markers(split).get(shard)
        if marker is None or not marker.contexts:
            return self.whole.read_keep(split, shard)
        bits = np.unpackbits(self._keep_bits[split, shard], count=marker.rows)
        return bits.astype(bool).reshape(-1, self.seq_len)

    def _filtered(self, split: str, marker: Marker) -> Marker:
        if not marker.contexts:
            return marker
        stored = {hook: self.whole.read_stored(split, marker.shard, hook) for hook in self._filtered_hooks}
        contexts = self.whole.read_contexts(split, marker.shard)
        keep = (contexts.keep & self.row_filter.keeps_tokens(contexts.tokens)).reshape(-1)
        for hook, largest in self.row_filter.max_norms.items():
            if hook in stored:
                keep &= norms(decode(stored[hook], self.dtype[hook])) <= largest
        sums = {hook: kept_sums(rows, keep, self.dtype[hook]) for hook, rows in stored.items()}
        self._keep_bits[split, marker.shard] = np.packbits(keep)
        return replace(
            marker,
            kept_rows=int(keep.sum()),
            sum={hook: found.sum for hook, found in sums.items()},
            sum_sq={hook: found.sum_sq for hook, found in sums.items()},
            units={hook: found.units for hook, found in sums.items()},
        )


def norms(rows: np.ndarray) -> np.ndarray:
    """‖x‖ of each row in float64: the sum of squares added by numpy, so equal rows give equal bits."""
    wide = rows.astype(np.float64)
    found: np.ndarray = np.sqrt(np.square(wide, out=wide).sum(axis=-1))
    return found


def median_norm(store: ActivationReader, hook_point: str, row_filter: RowFilter) -> float:
    """The median of ‖x‖ over the training rows that positions and tokens leave in, of shards spread over the store.

    Raises: StoreError if there are none.
    """
    shards = [shard for shard, marker in store.markers(TRAIN).items() if marker.kept_rows]
    n = min(len(shards), MEDIAN_SHARDS)
    found = []
    for shard in (shards[i * len(shards) // n] for i in range(n)):
        contexts = store.read_contexts(TRAIN, shard)
        keep = (contexts.keep & row_filter.keeps_tokens(contexts.tokens)).reshape(-1)
        found.append(norms(store.read_acts(TRAIN, shard, hook_point)[keep]))
    if not sum(map(len, found)):
        raise StoreError(f"{store.path}: the row filter leaves no training row; skip fewer positions or tokens")
    return float(np.median(np.concatenate(found)))


def filtered(
    store: ActivationReader, recorded: Mapping[str, Any] | None, hook_points: Iterable[str], watch: Watch = iter
) -> ActivationReader:
    """The store as a dictionary with this recorded row filter sees it; without one the store itself."""
    if recorded is None:
        return store
    return FilteredStore(store, RowFilter.of_json(recorded), hook_points, watch)
