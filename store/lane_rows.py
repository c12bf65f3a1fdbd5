"""Kept rows of a store in an order of which each rank reads its own shards alone.

The shards are dealt to lanes of about equally many rows, and every batch takes equally many rows from each lane. Each
lane is shuffled by itself (`store.batches`), and a rank takes the rows of neighbouring lanes: so the sequence of rows
does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from store.activation_reader import ActivationReader
from store.batches import Drawn, ShuffledRows, filled_shards
from store.common import TRAIN, StoreError
from store.shuffle_plan import ShardCounts, dealt_to_lanes, seed_of_lane

EVEN = 0.9  # rows of the smallest lane, at least, as a share of the largest: rows of a smaller one come more often


class LaneRows:
    """Batches of kept rows, evenly from lanes; `draw(step)` is a pure function of the seed, the step and the plan.

    In an epoch of a lane each of its rows comes once; lanes differ in size by a tenth at most. Rank r of `world` has
    the lanes r · lanes / world and following, and reads no other.
    """

    def __init__(
        self,
        store: ActivationReader,
        hook_point: str,
        *,
        lanes: int,
        batch_rows: int,
        seed: int,
        memory_bytes: int = 1 << 30,
        plans: Sequence[tuple[int, int]] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`batch_rows` is the number of rows of one rank; `memory_bytes` bounds the held rows of all lanes together.

        `plans` are those of another hook point, to read both row by row together. A lane holds at least one shard.
        Raises: StoreError where lanes cannot be shared out among ranks, rows among lanes, or shards evenly.
        """
        markers = filled_shards(store, TRAIN)
        shards, kept = list(markers), np.array([marker.kept_rows for marker in markers.values()])
        check_lanes(lanes, batch_rows, world)
        _check_shards(lanes, kept)
        places = dealt_to_lanes(kept, lanes)
        own = range(rank * lanes // world, (rank + 1) * lanes // world)
        each = batch_rows // len(own)
        self.lanes = [
            ShuffledRows(
                store,
                hook_point,
                batch_rows=each,
                seed=seed_of_lane(seed, lane),
                markers={shards[place]: markers[shards[place]] for place in places[lane].tolist()},
                **_plan(plans, lane - own.start, memory_bytes // lanes),
            )
            for lane in own
        ]
        self.d_in, self.n_rows, self.world = self.lanes[0].d_in, int(kept.sum()), world
        self._ends = np.cumsum([kept[lane].sum() for lane in places])  # of the rows of each lane, one after another
        self._own = own
        mine = np.concatenate([places[lane] for lane in own])
        self._counts = ShardCounts(kept[mine], np.array([marker.contexts for marker in markers.values()])[mine])

    @property
    def plans(self) -> list[tuple[int, int]]:
        """What decides the order of each own lane's rows, together with the seed: shards of a pool, and parts."""
        return [(lane.pool_shards, lane.parts) for lane in self.lanes]

    @property
    def exact(self) -> bool:
        """Whether each epoch of a lane is a uniform permutation of its rows."""
        return all(lane.exact for lane in self.lanes)

    def batch(self, step: int) -> np.ndarray:
        """This rank's rows of a batch, one lane's after another's, float32 [batch_rows, d_in]."""
        return self.draw(step).rows

    def draw(self, step: int) -> Drawn:
        """The batch of a step, and the context of each of its rows."""
        rows, contexts = zip(*(lane.draw(step) for lane in self.lanes), strict=True)
        return Drawn(np.concatenate(rows), np.concatenate(contexts))

    def mixing(self, contexts: np.ndarray) -> float:
        """Distinct contexts among this rank's rows, as a share of what a perfect shuffle gives; 1 is perfect."""
        return len(np.unique(contexts)) / self._counts.expected_contexts(len(contexts))

    def sample(self, n: int, seed: int) -> np.ndarray:
        """This rank's part of `n` distinct kept rows: of each own lane as many as its share of all rows.

        The parts of all ranks together are a pure function of `seed`. Raises: StoreError if fewer rows are kept.
        """
        if not 0 <= n <= self.n_rows:
            raise StoreError(f"cannot draw {n} distinct rows: {self.n_rows} are kept")
        wanted = self._rows_of_sample(n)[self._own.start : self._own.stop].tolist()
        drawn = (
            lane.sample(rows, seed_of_lane(seed, number))
            for lane, number, rows in zip(self.lanes, self._own, wanted, strict=True)
        )
        return np.concatenate(list(drawn))

    def sample_lengths(self, n: int) -> list[int]:
        """How many rows of a sample each rank has."""
        return [int(part.sum()) for part in np.split(self._rows_of_sample(n), self.world)]

    def _rows_of_sample(self, n: int) -> np.ndarray:
        """How many rows of a sample come from each lane."""
        ends = [n * end // self.n_rows for end in self._ends.tolist()]
        return np.diff(np.array([0, *ends], np.int64))


def _plan(plans: Sequence[tuple[int, int]] | None, lane: int, memory_bytes: int) -> dict[str, Any]:
    """The arguments that decide a lane's pools."""
    if plans is None:
        return {"memory_bytes": memory_bytes}
    return dict(zip(("pool_shards", "parts"), plans[lane], strict=True))


def check_lanes(lanes: int, batch_rows: int, world: int) -> None:
    """Raises: StoreError where lanes cannot be shared out among ranks, or the rows of all ranks among lanes."""
    if lanes < 1 or lanes % world:
        fitting = max(world, lanes // world * world)
        raise StoreError(
            f"row_lanes must be a multiple of the number of processes, so that each has lanes of its own; got {lanes} "
            f"lanes and {world} processes. Use {fitting} or {fitting + world} lanes, or other processes."
        )
    if batch_rows * world % lanes:
        lower = max(lanes, batch_rows * world // lanes * lanes)
        raise StoreError(
            f"a batch of {batch_rows * world:,} rows cannot be taken evenly from {lanes} lanes (row_lanes). Use "
            f"--batch-tokens {lower} or {lower + lanes}."
        )


def _check_shards(lanes: int, kept: np.ndarray) -> None:
    if _evenness(kept, lanes) < EVEN:
        fitting = next(n for n in range(min(lanes, len(kept)), 0, -1) if _evenness(kept, n) >= EVEN)
        raise StoreError(
            f"the store has {len(kept)} shards with kept rows, which cannot be divided into {lanes} lanes of about "
            f"equally many rows (row_lanes). Use {fitting} lanes or fewer."
        )


def _evenness(kept: np.ndarray, lanes: int) -> float:
    """Rows of the smallest lane, as a share of those of the largest."""
    rows = [int(kept[places].sum()) for places in dealt_to_lanes(kept, lanes)]
    return min(rows) / max(rows)
