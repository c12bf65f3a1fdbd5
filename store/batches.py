"""Kept rows of an activation store in a shuffled order that can be entered anywhere.

The rows of an epoch come pool by pool: a pool is as many whole shards as the memory allows, taken
in a seeded order of the shards, and its kept rows are permuted with a seed of their own. If one
pool holds the whole split, the order is a uniform permutation. Nothing is remembered from batch to
batch, so step n of a resumed run gets the rows that step n of an unbroken one got.
"""

from __future__ import annotations

import numpy as np

from store.activations import ActivationStore
from store.schema import StoreError, decode, stored_dtype

_SHARD_ORDER, _ROW_ORDER, _SAMPLE = range(3)  # independent streams of one seed
_PERMUTATION_BYTES = 8  # int64 row numbers, per row


class ShuffledRows:
    """Batches of kept rows; `batch(step)` is a pure function of (seed, step).

    Also of the written shards and of `pool_shards`, the number of shards shuffled together. It
    follows from `memory_bytes` unless given; a run that must go on bit for bit with other memory
    (or two hooks that must be read row by row together) should record it and pass it.
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
    ) -> None:
        """Plan the epochs of a split's written shards; raises StoreError if no row is kept.

        `memory_bytes` bounds the rows held (in the dtype on disk) and their permutation; one
        shard is always held, and one more is in memory while it is read.
        """
        if hook_point not in store.hook_points:
            known = ", ".join(store.hook_points)
            raise StoreError(f"{store.path} has no hook point {hook_point!r}: it has {known}")
        if batch_rows < 1 or seed < 0 or (pool_shards is not None and pool_shards < 1):
            raise StoreError(
                "batch_rows and pool_shards must be at least 1 and seed at least 0, got "
                f"{batch_rows}, {pool_shards} and {seed}"
            )
        kept = {s: m.kept_rows for s, m in store.markers(split).items() if m.kept_rows}
        if not kept:
            raise StoreError(f"{store.path} has no kept rows in split {split!r} yet: harvest it first")
        self.store, self.hook_point, self.split = store, hook_point, split
        self.batch_rows, self.seed = batch_rows, seed
        self.d_in = store.hook_points[hook_point]
        self._shards = np.array(list(kept))
        self._kept = np.array(list(kept.values()))
        self.n_rows = int(self._kept.sum())
        self._dtype = stored_dtype(store.dtype)
        row_bytes = self.d_in * self._dtype.itemsize + _PERMUTATION_BYTES
        if pool_shards is None:
            pool_shards = self._fitting_shards(row_bytes, memory_bytes)
        self.pool_shards = min(pool_shards, len(self._shards))
        self.exact = self.pool_shards == len(self._shards)
        self._pool_held: tuple[int, ...] = ()
        self._buffer = np.empty((0, self.d_in), self._dtype)
        self._epoch_plan: tuple[int, list[np.ndarray]] = (-1, [])
        self._row_order: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0, np.int64))

    def _fitting_shards(self, row_bytes: int, memory_bytes: int) -> int:
        if self.n_rows * row_bytes <= memory_bytes:
            return len(self._shards)
        return max(1, memory_bytes // (int(self._kept.max()) * row_bytes))

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one pass over the kept rows; not rounded, a batch may span two epochs."""
        return self.n_rows / self.batch_rows

    def batch(self, step: int) -> np.ndarray:
        """Rows `[step * batch_rows, (step + 1) * batch_rows)` of the endless shuffled sequence.

        Float32 [batch_rows, d_in]; each epoch of the sequence is a permutation of the kept rows.
        Fastest in ascending order of steps: then each shard is read once an epoch.
        """
        if step < 0:
            raise StoreError(f"step must be at least 0, got {step}")
        out = np.empty((self.batch_rows, self.d_in), np.float32)
        filled = 0
        while filled < self.batch_rows:
            position = step * self.batch_rows + filled
            rows, start, order = self._pool_at(position)
            chosen = order[start : start + self.batch_rows - filled]
            part = out[filled : filled + len(chosen)]
            decode(np.take(rows, chosen, axis=0), self.store.dtype, out=part)
            filled += len(chosen)
        return out

    def sample(self, n: int, seed: int) -> np.ndarray:
        """`n` distinct kept rows drawn uniformly, float32 [n, d_in]: a pure function of `seed`.

        Independent of this object's own seed, of its pools and of every batch. Raises StoreError
        if there are fewer than `n` kept rows.
        """
        if not 0 <= n <= self.n_rows:
            raise StoreError(f"cannot draw {n} distinct rows: {self.n_rows} are kept")
        chosen = _generator(seed, _SAMPLE).choice(self.n_rows, size=n, replace=False)
        if self.exact:
            rows = self._hold(np.arange(len(self._shards)))
            return decode(np.take(rows, chosen, axis=0), self.store.dtype)
        out = np.empty((n, self.d_in), np.float32)
        ends = np.cumsum(self._kept)
        places = np.searchsorted(ends, chosen, side="right")
        for place in np.unique(places).tolist():
            mine = np.flatnonzero(places == place)
            rows = self._kept_rows(place)
            inside = chosen[mine] - (ends[place] - self._kept[place])
            out[mine] = decode(rows[inside], self.store.dtype)
        return out

    # ---- pools ----

    def _pool_at(self, position: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Kept rows of the pool that `position` falls in, where in its order, and that order."""
        epoch, offset = divmod(position, self.n_rows)
        pools = self._pools(epoch)
        ends = np.cumsum([int(self._kept[pool].sum()) for pool in pools])
        number = int(np.searchsorted(ends, offset, side="right"))
        size = int(self._kept[pools[number]].sum())
        start = offset - (int(ends[number]) - size)
        key = (epoch, number)
        if self._row_order[0] != key:
            order = _generator(self.seed, _ROW_ORDER, epoch, number).permutation(size)
            self._row_order = (key, order)
        return self._hold(pools[number]), start, self._row_order[1]

    def _pools(self, epoch: int) -> list[np.ndarray]:
        """Places (in `_shards`) of each pool of an epoch; sizes differ by one shard at most."""
        if self._epoch_plan[0] != epoch:
            places = np.arange(len(self._shards))
            if not self.exact:
                places = _generator(self.seed, _SHARD_ORDER, epoch).permutation(places)
            count = -(-len(places) // self.pool_shards)
            self._epoch_plan = (epoch, np.array_split(places, count))
        return self._epoch_plan[1]

    def _hold(self, pool: np.ndarray) -> np.ndarray:
        """Kept rows of these shards, one after another, from memory if they are the last asked."""
        wanted = tuple(pool.tolist())
        size = int(self._kept[pool].sum())
        if self._pool_held != wanted:
            self._pool_held = ()  # an error below must not leave half a pool behind
            if len(self._buffer) < size:
                largest = int(np.sort(self._kept)[-self.pool_shards :].sum())
                self._buffer = np.empty((largest, self.d_in), self._dtype)
            end = 0
            for place in wanted:
                start, end = end, end + int(self._kept[place])
                self._kept_rows(place, out=self._buffer[start:end])
            self._pool_held = wanted
        return self._buffer[:size]

    def _kept_rows(self, place: int, out: np.ndarray | None = None) -> np.ndarray:
        """Kept rows of one shard as stored, in row order, written to `out` if given."""
        shard = int(self._shards[place])
        keep = self.store.read_contexts(self.split, shard).keep.reshape(-1)
        if int(keep.sum()) != self._kept[place]:
            raise StoreError(
                f"{self.store.path}: {self.split} shard {shard} was written again while in use; start again"
            )
        stored = self.store.read_stored(self.split, shard, self.hook_point)
        return np.compress(keep, stored, axis=0, out=out)


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *stream))))
