"""The order in which the kept rows of some shards are returned, as row numbers: a pure function of a seed.

An epoch goes through pools of rows one after another, and each pool is permuted with its own seed. If one pool holds
all rows, the order is a uniform permutation. If memory is short, a pool takes one random part (of `parts` equal parts)
of each of many shards, instead of all rows of a few shards: neighbours in the text then still come in different
batches, but each shard is read `parts` times per epoch. Shards are numbered by their place in the list of written
shards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

_SHARD_ORDER, _ROW_ORDER, _SAMPLE, _PART_ORDER, _LANE = range(5)  # independent streams of one seed
WELL_MIXED = 0.97  # how many distinct contexts a batch should have, as a share of those after a perfect shuffle
MOST_PARTS = 16
_FEWEST_ROWS = 8  # rows of a shard in one part, at least


class Pool(NamedTuple):
    """Part `part` of the rows of the shards at `places`, as divided in this epoch."""

    epoch: int
    places: np.ndarray
    part: int


class Slot(NamedTuple):
    """Where a position of the sequence falls: a pool, the order of its rows, and the offset in that order."""

    pool: Pool
    order: np.ndarray
    offset: int


@dataclass(frozen=True, eq=False)
class ShardCounts:
    """What a plan needs to know of the written shards."""

    kept: np.ndarray  # rows, at least one in each shard
    contexts: np.ndarray

    @cached_property
    def n_rows(self) -> int:
        """Kept rows of all shards."""
        return int(self.kept.sum())

    def expected_contexts(self, batch_rows: int) -> float:
        """Distinct contexts in a batch of rows drawn uniformly: Σ_c 1 − (1 − B/N)^k_c, with k_c kept rows in context c.

        k_c is taken as the mean of c's shard: where they differ the result is too large, never too small.
        """
        missed = (1 - min(1.0, batch_rows / self.n_rows)) ** (self.kept / self.contexts)
        return float((self.contexts * (1 - missed)).sum())

    def fitting_pools(self, memory_rows: int, batch_rows: int) -> tuple[int, int]:
        """(pool_shards, parts) for pools of `memory_rows` rows (or of one shard, if that is larger).

        As few parts as mix batches of `batch_rows` well, since each part is another reading of the shards.
        """
        n_shards = len(self.kept)
        if self.n_rows <= memory_rows:
            return n_shards, 1
        largest = int(self.kept.max())
        memory_rows = max(memory_rows, largest)
        perfect = self.expected_contexts(batch_rows)
        pool_shards, parts = 1, 1
        for parts in range(1, max(1, min(MOST_PARTS, largest // _FEWEST_ROWS)) + 1):
            pool_shards = min(n_shards, memory_rows // -(-largest // parts))
            share = 1 / -(-n_shards // pool_shards)  # of the shards in a pool: groups are of equal size
            pool_rows = max(1.0, self.n_rows * share / parts)
            drawn = min(1.0, batch_rows / pool_rows) / parts  # that a row is in the pool and in the batch
            missed = (1 - drawn) ** (self.kept / self.contexts)
            expected = float((self.contexts * (1 - missed)).sum()) * share
            if expected >= WELL_MIXED * perfect or pool_shards == n_shards:
                break
        return pool_shards, parts


@dataclass(eq=False)
class ShufflePlan:
    """An endless sequence of rows: each epoch of it is a permutation of all kept rows."""

    counts: ShardCounts
    seed: int
    pool_shards: int
    parts: int
    _epoch: tuple[int, list[np.ndarray], np.ndarray] = field(default=(-1, [], np.empty(0, np.int64)), init=False)
    _order: tuple[tuple[int, int], np.ndarray] = field(default=((-1, -1), np.empty(0, np.int64)), init=False)

    def __post_init__(self) -> None:
        self.pool_shards = min(self.pool_shards, len(self.counts.kept))

    @property
    def exact(self) -> bool:
        """Whether an epoch is a uniform permutation: one pool holds all rows."""
        return self.pool_shards == len(self.counts.kept) and self.parts == 1

    @property
    def whole(self) -> Pool:
        """The pool of an exact plan, the same in each epoch."""
        return Pool(0, np.arange(len(self.counts.kept)), 0)

    @property
    def largest_pool_rows(self) -> int:
        """A bound on the rows of any pool."""
        return int(np.sort(self.pool_rows(self.whole))[-self.pool_shards :].sum())

    def slot(self, position: int) -> Slot:
        """Where the row at `position` of the sequence comes from."""
        epoch, offset = divmod(position, self.counts.n_rows)
        groups, ends = self._pools(epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[number - 1]) if number else 0
        if self._order[0] != (epoch, number):
            order = _generator(self.seed, _ROW_ORDER, epoch, number).permutation(int(ends[number]) - start)
            self._order = ((epoch, number), order)
        group, part = divmod(number, self.parts)
        return Slot(Pool(epoch, groups[group], part), self._order[1], offset - start)

    def pool_rows(self, pool: Pool) -> np.ndarray:
        """Rows that a pool takes of each of its shards."""
        kept: np.ndarray = self.counts.kept[pool.places]
        return np.asarray(kept // self.parts + (pool.part < kept % self.parts))

    def rows_of_shard(self, pool: Pool, place: int) -> np.ndarray | slice:
        """Which of a shard's kept rows are in a pool: a random draw, another in each epoch."""
        if self.parts == 1:
            return slice(None)
        order = _generator(self.seed, _PART_ORDER, pool.epoch, place).permutation(int(self.counts.kept[place]))
        return np.asarray(np.sort(np.array_split(order, self.parts)[pool.part]))

    def pool_key(self, pool: Pool) -> tuple[int, ...]:
        """Equal for pools of the same rows."""
        return (pool.epoch if self.parts > 1 else 0, pool.part, *pool.places.tolist())

    def _pools(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each group in an epoch, and where each pool (a part of a group) ends in the epoch."""
        if self._epoch[0] != epoch:
            places = np.arange(len(self.counts.kept))
            if self.pool_shards < len(places):
                places = _generator(self.seed, _SHARD_ORDER, epoch).permutation(places)
            groups = np.array_split(places, -(-len(places) // self.pool_shards))
            pools = [Pool(epoch, group, part) for group in groups for part in range(self.parts)]
            self._epoch = (epoch, groups, np.cumsum([self.pool_rows(pool).sum() for pool in pools]))
        return self._epoch[1], self._epoch[2]


def sample(n_rows: int, n: int, seed: int) -> np.ndarray:
    """`n` distinct row numbers below `n_rows`, drawn uniformly; independent of every plan with the same seed."""
    return np.asarray(_generator(seed, _SAMPLE).choice(n_rows, size=n, replace=False))


def dealt_to_lanes(rows: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Which of some shards, by their place, each lane has: the largest shard left goes to the lane with fewest rows."""
    held, places = np.zeros(lanes, np.int64), [[] for _ in range(lanes)]  # type: ignore[var-annotated]
    for place in np.argsort(-rows, kind="stable").tolist():
        lane = int(held.argmin())
        held[lane] += rows[place]
        places[lane].append(place)
    return [np.sort(np.array(each, np.int64)) for each in places]


def seed_of_lane(seed: int, lane: int) -> int:
    """The seed of one lane's order, independent of the other lanes' and of `seed` itself."""
    return int(_generator(seed, _LANE, lane).integers(2**63))


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *stream))))
