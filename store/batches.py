"""Kept rows of an activation store in a shuffled order (`store.shuffle_plan`) that can be read from any step.

No batch depends on an earlier one, so step n of a resumed run gets the rows that step n of an unbroken run got.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from store import shuffle_plan
from store.activation_reader import ActivationReader
from store.common import TRAIN, StoreError, read_ahead
from store.schema import decode, stored_dtype
from store.shards import Marker
from store.shuffle_plan import Pool, ShardCounts, ShufflePlan, Slot

_PLACE_BYTES = 16  # of a held row: its place in the permutation and its context, int64 both


class Drawn(NamedTuple):
    """A batch's rows, float32 [batch_rows, d_in], and the context of each, int64 [batch_rows]."""

    rows: np.ndarray
    contexts: np.ndarray


def filled_shards(store: ActivationReader, split: str) -> dict[int, Marker]:
    """The markers of a split's shards that have kept rows. Raises: StoreError if there are none."""
    markers = {shard: marker for shard, marker in store.markers(split).items() if marker.kept_rows}
    if not markers:
        raise StoreError(f"{store.path} has no kept rows in split {split!r} yet: harvest it first")
    return markers


class ShuffledRows:
    """Batches of kept rows; `batch(step)` is a pure function of the seed, the step, the written shards and the plan.

    The plan (`pool_shards` and `parts`) follows from `memory_bytes` unless given: pass a recorded one to continue bit
    for bit with another memory, or to read two hooks row by row together. With `world` data-parallel ranks, each gets
    its own rows of every global batch.
    """

    def __init__(
        self,
        store: ActivationReader,
        hook_point: str,
        *,
        split: str = TRAIN,
        batch_rows: int,
        seed: int,
        memory_bytes: int = 1 << 30,
        pool_shards: int | None = None,
        parts: int = 1,
        rank: int = 0,
        world: int = 1,
        markers: Mapping[int, Marker] | None = None,
    ) -> None:
        """Plans the epochs of a split's written shards, or of some of them, given by their `markers`.

        Raises: StoreError if no row is kept.

        `memory_bytes` bounds the held rows (in the dtype on disk) with their permutation and contexts; the rows of one
        shard are always held, and two more shards are in memory while they are read. `parts` is used only with
        `pool_shards`.
        """
        if hook_point not in store.hook_points:
            known = ", ".join(store.hook_points)
            raise StoreError(f"{store.path} has no hook point {hook_point!r}: it has {known}")
        if batch_rows < 1 or seed < 0 or parts < 1 or (pool_shards is not None and pool_shards < 1):
            raise StoreError(
                "batch_rows, pool_shards and parts must be at least 1 and seed at least 0, got "
                f"{batch_rows}, {pool_shards}, {parts} and {seed}"
            )
        if not 0 <= rank < world:
            raise StoreError(f"rank must be below world, got rank {rank} of {world}")
        markers = filled_shards(store, split) if markers is None else markers
        self.store, self.hook_point, self.split = store, hook_point, split
        self.batch_rows, self.rank, self.world = batch_rows, rank, world
        self.d_in = store.hook_points[hook_point]
        self._dtype, self._stored_dtype = store.dtype[hook_point], stored_dtype(store.dtype[hook_point])
        self._shards = np.array(list(markers))
        self._first_contexts = np.array([store.first_context(split, shard) for shard in markers])
        self._counts = ShardCounts(
            np.array([marker.kept_rows for marker in markers.values()]),
            np.array([marker.contexts for marker in markers.values()]),
        )
        self.n_rows = self._counts.n_rows
        if pool_shards is None:
            row_bytes = self.d_in * self._stored_dtype.itemsize + _PLACE_BYTES
            pool_shards, parts = self._counts.fitting_pools(memory_bytes // row_bytes, batch_rows * world)
        self._plan = ShufflePlan(self._counts, seed, pool_shards, parts)
        self._held: tuple[int, ...] = ()  # which pool is in the buffer
        self._buffer = np.empty((0, self.d_in), self._stored_dtype)
        self._held_contexts = np.empty(0, np.int64)  # of the rows in the buffer
        self._keep_bits: dict[int, np.ndarray] = {}

    @property
    def pool_shards(self) -> int:
        """Shards in a pool."""
        return self._plan.pool_shards

    @property
    def parts(self) -> int:
        """Parts that the rows of a shard are divided into."""
        return self._plan.parts

    @property
    def exact(self) -> bool:
        """Whether each epoch is a uniform permutation of the rows."""
        return self._plan.exact

    @property
    def plan(self) -> dict[str, Any]:
        """What decides the order of rows, together with the seed."""
        return {"exact": self.exact, "pool_shards": self.pool_shards, "parts": self.parts}

    @property
    def steps_per_epoch(self) -> float:
        """Batches (of each rank) in one pass over the kept rows; not rounded, since a batch may span two epochs."""
        return self.n_rows / (self.batch_rows * self.world)

    def mixing(self, contexts: np.ndarray) -> float:
        """Distinct contexts in a batch, as a share of what a perfect shuffle gives on average; 1 is perfect."""
        return len(np.unique(contexts)) / self._counts.expected_contexts(len(contexts))

    def batch(self, step: int) -> np.ndarray:
        """Rows `[n * batch_rows, (n + 1) * batch_rows)` of the endless sequence, n = step * world + rank.

        Float32 [batch_rows, d_in]; each epoch of the sequence is a permutation of the kept rows.
        Fastest in ascending order of steps: then each part of a shard is read once an epoch.
        """
        return self.draw(step).rows

    def draw(self, step: int) -> Drawn:
        """The batch of a step, and the context of each of its rows."""
        if step < 0:
            raise StoreError(f"step must be at least 0, got {step}")
        drawn = Drawn(np.empty((self.batch_rows, self.d_in), np.float32), np.empty(self.batch_rows, np.int64))
        first, filled = self.first_position(step), 0
        while filled < self.batch_rows:
            slot = self._plan.slot(first + filled)
            self._hold(slot.pool)
            chosen = slot.order[slot.offset : slot.offset + self.batch_rows - filled]
            part = slice(filled, filled + len(chosen))
            decode(np.take(self._buffer, chosen, axis=0), self._dtype, out=drawn.rows[part])
            drawn.contexts[part] = self._held_contexts[chosen]
            filled += len(chosen)
        return drawn

    # ---- for whoever holds the rows elsewhere ----

    @property
    def dtype(self) -> str:
        """The name of the dtype that rows are stored in."""
        return self._dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is stored."""
        return self.d_in * self._stored_dtype.itemsize

    @property
    def largest_pool_rows(self) -> int:
        """A bound on the rows of any pool."""
        return self._plan.largest_pool_rows

    def first_position(self, step: int) -> int:
        """Where the batch of a step begins in the endless sequence."""
        return (step * self.world + self.rank) * self.batch_rows

    def slot(self, position: int) -> Slot:
        """Where the row at a position of the endless sequence comes from."""
        return self._plan.slot(position)

    def read_pool(self, pool: Pool) -> Iterator[np.ndarray]:
        """The rows of a pool in the dtype on disk, one shard's after another's."""
        if self._held == self._plan.pool_key(pool):  # a sample has read it
            yield self._buffer[: int(self._plan.pool_rows(pool).sum())]
            return
        for _, rows, stored in self._shards_of(pool):
            yield stored[rows]

    def read_all(self) -> Iterator[np.ndarray]:
        """All kept rows in the dtype on disk, one shard's after another's, in the order that `numbers_of` numbers."""
        if self.exact:
            yield from self.read_pool(self._plan.whole)
            return
        for place, stored in enumerate(read_ahead(self._stored, range(len(self._shards)))):
            yield stored[self._kept_numbers(place)]

    def numbers_of(self, pool: Pool) -> np.ndarray:
        """The numbers of a pool's rows among all kept rows, in the order of `read_pool`."""
        ends = np.cumsum(self._counts.kept)
        firsts = ends - self._counts.kept
        parts = [
            firsts[place] + np.arange(self._counts.kept[place])[self._plan.rows_of_shard(pool, place)]
            for place in pool.places.tolist()
        ]
        return np.concatenate(parts)

    def contexts_of(self, pool: Pool) -> np.ndarray:
        """The context of each row of a pool, in the order of `read_pool`."""
        parts = [
            self._contexts(place, self._kept_numbers(place)[self._plan.rows_of_shard(pool, place)])
            for place in pool.places.tolist()
        ]
        return np.concatenate(parts)

    def chosen_for_sample(self, n: int, seed: int) -> np.ndarray:
        """The numbers, among all kept rows, of those that `sample` draws."""
        if not 0 <= n <= self.n_rows:
            raise StoreError(f"cannot draw {n} distinct rows: {self.n_rows} are kept")
        return shuffle_plan.sample(self.n_rows, n, seed)

    # ---- samples ----

    def sample(self, n: int, seed: int) -> np.ndarray:
        """`n` distinct kept rows drawn uniformly, float32 [n, d_in]: a pure function of `seed`.

        Independent of this object's own seed, of its pools and of every batch. Raises: StoreError if fewer than `n`
        rows are kept.
        """
        chosen = self.chosen_for_sample(n, seed)
        if self.exact:
            self._hold(self._plan.whole)
            return decode(np.take(self._buffer, chosen, axis=0), self._dtype)
        out = np.empty((n, self.d_in), np.float32)
        ends = np.cumsum(self._counts.kept)
        places = np.searchsorted(ends, chosen, side="right")
        for place in np.unique(places).tolist():
            mine = np.flatnonzero(places == place)
            inside = chosen[mine] - (ends[place] - self._counts.kept[place])
            out[mine] = decode(self._stored(place)[self._kept_numbers(place)[inside]], self._dtype)
        return out

    def _hold(self, pool: Pool) -> None:
        """Reads a pool into the buffer, one shard's rows after another's, unless it is there already."""
        key = self._plan.pool_key(pool)
        if self._held == key:
            return
        self._held = ()  # an error below must not leave half a pool behind
        sizes = self._plan.pool_rows(pool).tolist()
        if len(self._buffer) < sum(sizes):
            self._buffer = np.empty((self._plan.largest_pool_rows, self.d_in), self._stored_dtype)
            self._held_contexts = np.empty(len(self._buffer), np.int64)
        end = 0
        for size, (place, rows, stored) in zip(sizes, self._shards_of(pool), strict=True):
            start, end = end, end + size
            np.take(stored, rows, axis=0, out=self._buffer[start:end], mode="clip")  # unlike "raise" without a copy
            self._held_contexts[start:end] = self._contexts(place, rows)
        self._held = key

    def _shards_of(self, pool: Pool) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The places of a pool, the numbers inside each shard of the pool's rows, and all rows of the shard."""
        shards: Iterator[np.ndarray] = read_ahead(self._stored, pool.places.tolist())
        for place, stored in zip(pool.places.tolist(), shards, strict=True):
            yield place, self._kept_numbers(place)[self._plan.rows_of_shard(pool, place)], stored

    def _contexts(self, place: int, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._first_contexts[place] + rows // self.store.seq_len)

    def _stored(self, place: int) -> np.ndarray:
        """All rows of a shard, in the dtype on disk."""
        return self.store.read_stored(self.split, int(self._shards[place]), self.hook_point)

    def _kept_numbers(self, place: int) -> np.ndarray:
        """Numbers inside a shard of its kept rows, ascending. The mask stays in memory as bits: each part needs it."""
        if place not in self._keep_bits:
            shard = int(self._shards[place])
            keep = self.store.read_keep(self.split, shard)
            if int(keep.sum()) != self._counts.kept[place]:
                raise StoreError(
                    f"{self.store.path}: {self.split} shard {shard} was written again while in use; start again"
                )
            self._keep_bits[place] = np.packbits(keep)
        return np.flatnonzero(np.unpackbits(self._keep_bits[place]))
