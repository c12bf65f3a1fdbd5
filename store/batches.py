"""Kept rows of an activation store in a shuffled order that can be entered anywhere.

The rows of an epoch come pool by pool, each permuted with a seed of its own. If one pool holds the whole split, the
order is a uniform permutation. Where memory is short, a pool takes one part in `parts` of the rows (drawn at random)
of many shards instead of all rows of few: neighbours in text then still come in different batches, at the price of
reading each shard `parts` times an epoch. Nothing is remembered from batch to batch, so step n of a resumed run gets
the rows that step n of an unbroken one got.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from store.activations import ActivationStore
from store.common import StoreError, read_ahead
from store.schema import decode, stored_dtype

_SHARD_ORDER, _ROW_ORDER, _SAMPLE, _PART_ORDER = range(4)  # independent streams of one seed
_PLACE_BYTES = 16  # of a held row: its place in the permutation and its context, int64 both
WELL_MIXED = 0.97  # planned distinct contexts in a batch, against a perfect shuffle's; 0.95 is wanted
MOST_PARTS = 16
_FEWEST_ROWS = 8  # of a shard in a part


class Drawn(NamedTuple):
    """A batch's rows, float32 [batch_rows, d_in], and the context that each comes from, int64 [batch_rows]."""

    rows: np.ndarray
    contexts: np.ndarray


class ShuffledRows:
    """Batches of kept rows; `batch(step)` is a pure function of (seed, step).

    Also of the written shards and of `pool_shards` and `parts` (see `plan`), which follow from `memory_bytes` unless
    given; a run that must go on bit for bit with other memory (or two hooks that must be read row by row together)
    should record them and pass them. Of `world` data-parallel ranks each gets its own rows of every global batch.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook_point: str,
        *,
        split: str = "train",
        batch_rows: int,
        seed: int,
        memory_bytes: int = 1 << 30,
        pool_shards: int | None = None,
        parts: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Plan the epochs of a split's written shards; raises StoreError if no row is kept.

        `memory_bytes` bounds the rows held (in the dtype on disk) with their permutation and contexts; one shard's
        rows are always held, and two more shards are in memory while they are read. `parts` counts with `pool_shards`
        alone.
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
        markers = {s: m for s, m in store.markers(split).items() if m.kept_rows}
        if not markers:
            raise StoreError(f"{store.path} has no kept rows in split {split!r} yet: harvest it first")
        self.store, self.hook_point, self.split = store, hook_point, split
        self.batch_rows, self.seed, self.rank, self.world = batch_rows, seed, rank, world
        self.d_in = store.hook_points[hook_point]
        self._shards = np.array(list(markers))
        self._kept = np.array([marker.kept_rows for marker in markers.values()])
        self._contexts = np.array([marker.contexts for marker in markers.values()])
        self.n_rows = int(self._kept.sum())
        self._dtype = stored_dtype(store.dtype[hook_point])
        row_bytes = self.d_in * self._dtype.itemsize + _PLACE_BYTES
        if pool_shards is None:
            pool_shards, parts = self._fitting(memory_bytes // row_bytes)
        self.pool_shards = min(pool_shards, len(self._shards))
        self.parts = parts
        self.exact = self.pool_shards == len(self._shards) and parts == 1
        self._logical = store.dtype[hook_point]
        self._pool_held: tuple[int, ...] = ()
        self._buffer = np.empty((0, self.d_in), self._dtype)
        self._contexts_held = np.empty(0, np.int64)  # of the rows in `_buffer`
        self._first_contexts = np.array([store.first_context(split, shard) for shard in markers])
        self._keep_bits: dict[int, np.ndarray] = {}
        self._epoch_plan: tuple[int, list[np.ndarray], np.ndarray] = (-1, [], np.empty(0, np.int64))
        self._row_order: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0, np.int64))

    def _fitting(self, memory_rows: int) -> tuple[int, int]:
        """Shards and parts of a pool: as few parts as mix well, since each is another reading of the shards."""
        if self.n_rows <= memory_rows:
            return len(self._shards), 1
        largest = int(self._kept.max())
        memory_rows = max(memory_rows, largest)
        perfect = self._distinct_if_perfect(self._global_rows)
        pool_shards, parts = 1, 1
        for parts in range(1, max(1, min(MOST_PARTS, largest // _FEWEST_ROWS)) + 1):
            pool_shards = min(len(self._shards), memory_rows // -(-largest // parts))
            share = 1 / -(-len(self._shards) // pool_shards)  # groups come out of equal size
            pool_rows = max(1.0, self.n_rows * share / parts)
            drawn = min(1.0, self._global_rows / pool_rows) / parts  # that a row is in the pool and in the batch
            missed = (1 - drawn) ** (self._kept / self._contexts)
            if float((self._contexts * (1 - missed)).sum()) * share >= WELL_MIXED * perfect:
                break
            if pool_shards == len(self._shards):
                break
        return pool_shards, parts

    @property
    def _global_rows(self) -> int:
        return self.batch_rows * self.world

    def _distinct_if_perfect(self, batch_rows: int) -> float:
        """Contexts expected in a batch of rows drawn uniformly: Σ_c 1 − (1 − B/N)^k_c, k_c kept rows each.

        k_c is the mean of c's shard, all that a marker knows: where they differ this is too many, never too few.
        """
        missed = (1 - min(1.0, batch_rows / self.n_rows)) ** (self._kept / self._contexts)
        return float((self._contexts * (1 - missed)).sum())

    def mixing(self, contexts: np.ndarray) -> float:
        """Distinct contexts in a batch, as a share of what a perfect shuffle would give on average; 1 is perfect."""
        return len(np.unique(contexts)) / self._distinct_if_perfect(len(contexts))

    @property
    def plan(self) -> dict[str, Any]:
        """What, with the seed, decides the order of rows."""
        return {"exact": self.exact, "pool_shards": self.pool_shards, "parts": self.parts}

    @property
    def steps_per_epoch(self) -> float:
        """Batches (of each rank) in one pass over the kept rows; not rounded, a batch may span two epochs."""
        return self.n_rows / self._global_rows

    def batch(self, step: int) -> np.ndarray:
        """Rows `[n * batch_rows, (n + 1) * batch_rows)` of the endless sequence, n = step * world + rank.

        Float32 [batch_rows, d_in]; each epoch of the sequence is a permutation of the kept rows.
        Fastest in ascending order of steps: then each shard is read once an epoch.
        """
        return self.draw(step).rows

    def draw(self, step: int) -> Drawn:
        """The batch of a step, and where in the text its rows stand."""
        if step < 0:
            raise StoreError(f"step must be at least 0, got {step}")
        drawn = Drawn(np.empty((self.batch_rows, self.d_in), np.float32), np.empty(self.batch_rows, np.int64))
        filled = 0
        while filled < self.batch_rows:
            position = (step * self.world + self.rank) * self.batch_rows + filled
            start, order = self._pool_at(position)
            chosen = order[start : start + self.batch_rows - filled]
            part = slice(filled, filled + len(chosen))
            decode(np.take(self._buffer, chosen, axis=0), self._logical, out=drawn.rows[part])
            drawn.contexts[part] = self._contexts_held[chosen]
            filled += len(chosen)
        return drawn

    def sample(self, n: int, seed: int) -> np.ndarray:
        """`n` distinct kept rows drawn uniformly, float32 [n, d_in]: a pure function of `seed`.

        Independent of this object's own seed, of its pools and of every batch. Raises StoreError
        if there are fewer than `n` kept rows.
        """
        if not 0 <= n <= self.n_rows:
            raise StoreError(f"cannot draw {n} distinct rows: {self.n_rows} are kept")
        chosen = _generator(seed, _SAMPLE).choice(self.n_rows, size=n, replace=False)
        if self.exact:
            self._hold(0, np.arange(len(self._shards)), 0)
            return decode(np.take(self._buffer, chosen, axis=0), self._logical)
        out = np.empty((n, self.d_in), np.float32)
        ends = np.cumsum(self._kept)
        places = np.searchsorted(ends, chosen, side="right")
        for place in np.unique(places).tolist():
            mine = np.flatnonzero(places == place)
            stored = self.store.read_stored(self.split, int(self._shards[place]), self.hook_point)
            inside = chosen[mine] - (ends[place] - self._kept[place])
            out[mine] = decode(stored[self._kept_numbers(place)[inside]], self._logical)
        return out

    # ---- pools ----

    def _pool_at(self, position: int) -> tuple[int, np.ndarray]:
        """Holds the pool that `position` falls in; where in its order that is, and the order."""
        epoch, offset = divmod(position, self.n_rows)
        groups, ends = self._pools(epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[number - 1]) if number else 0
        key = (epoch, number)
        if self._row_order[0] != key:
            order = _generator(self.seed, _ROW_ORDER, epoch, number).permutation(int(ends[number]) - start)
            self._row_order = (key, order)
        group, part = divmod(number, self.parts)
        self._hold(epoch, groups[group], part)
        return offset - start, self._row_order[1]

    def _pools(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Places (in `_shards`) of each group of an epoch, and where each pool, a part of a group, ends."""
        if self._epoch_plan[0] != epoch:
            places = np.arange(len(self._shards))
            if self.pool_shards < len(places):
                places = _generator(self.seed, _SHARD_ORDER, epoch).permutation(places)
            groups = np.array_split(places, -(-len(places) // self.pool_shards))
            sizes = [self._part_rows(group, part).sum() for group in groups for part in range(self.parts)]
            self._epoch_plan = (epoch, groups, np.cumsum(sizes))
        return self._epoch_plan[1], self._epoch_plan[2]

    def _part_rows(self, places: np.ndarray, part: int) -> np.ndarray:
        """Rows that a part takes of each of these shards."""
        return self._kept[places] // self.parts + (part < self._kept[places] % self.parts)

    def _part(self, epoch: int, place: int, part: int) -> np.ndarray | slice:
        """Which of a shard's kept rows are in a part: a random draw, other in each epoch."""
        if self.parts == 1:
            return slice(None)
        order = _generator(self.seed, _PART_ORDER, epoch, place).permutation(int(self._kept[place]))
        return np.sort(np.array_split(order, self.parts)[part])

    def _hold(self, epoch: int, group: np.ndarray, part: int) -> None:
        """Reads a pool into `_buffer` and `_contexts_held`, one shard's rows after another's, unless it is there."""
        wanted = (epoch if self.parts > 1 else 0, part, *group.tolist())
        if self._pool_held == wanted:
            return
        self._pool_held = ()  # an error below must not leave half a pool behind
        sizes = self._part_rows(group, part).tolist()
        if len(self._buffer) < sum(sizes):
            largest = int(np.sort(self._part_rows(np.arange(len(self._shards)), 0))[-self.pool_shards :].sum())
            self._buffer = np.empty((largest, self.d_in), self._dtype)
            self._contexts_held = np.empty(largest, np.int64)
        end = 0
        for place, size, stored in zip(group.tolist(), sizes, self._stored(group), strict=True):
            start, end = end, end + size
            rows = self._kept_numbers(place)[self._part(epoch, place, part)]
            np.take(stored, rows, axis=0, out=self._buffer[start:end], mode="clip")  # unlike "raise" without a copy
            self._contexts_held[start:end] = self._first_contexts[place] + rows // self.store.seq_len
        self._pool_held = wanted

    def _stored(self, group: np.ndarray) -> Iterator[np.ndarray]:
        """Each shard's rows, the next one read and checked while the caller copies from this one."""

        def read(place: int) -> np.ndarray:
            return self.store.read_stored(self.split, int(self._shards[place]), self.hook_point)

        return read_ahead(read, group.tolist())

    def _kept_numbers(self, place: int) -> np.ndarray:
        """Numbers inside a shard of its kept rows, ascending. Kept in memory as bits: each part asks again."""
        if place not in self._keep_bits:
            shard = int(self._shards[place])
            keep = self.store.read_keep(self.split, shard)
            if int(keep.sum()) != self._kept[place]:
                raise StoreError(
                    f"{self.store.path}: {self.split} shard {shard} was written again while in use; start again"
                )
            self._keep_bits[place] = np.packbits(keep)
        return np.flatnonzero(np.unpackbits(self._keep_bits[place]))


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *stream))))
