"""Training rows that lie on the device as they are stored: a batch is gathered there, and no row travels twice.

The order of rows is that of `store.batches.ShuffledRows`, which decides it; here is only where the rows wait. If all
kept rows fit into the memory, they are read once. Otherwise one pool of the plan is on the device, and the next one is
read and copied meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.side_stream import SideStream, page_locked
from store.batches import ShuffledRows
from store.common import read_ahead

NUMBER_BYTES = 8  # of a row: its number in the order of two pools, int32 both
SLOTS = 2  # pools on the device: one in use, one being filled
WORKING_SHARE = 0.1  # of the free memory, left over for what nobody counted


def memory_for_rows(free_bytes: int, d_in: int, d_sae: int, batch_tokens: int) -> int:
    """The bytes of a device that rows may take, beside a training run that has not begun yet.

    A run holds weights, gradients, two moments and a copy in float16 of each matrix; a dense step six matrices of
    activations.
    """
    weights = 2 * d_in * d_sae * (4 * 4 + 2)
    batch = batch_tokens * (24 * d_sae + 40 * d_in)
    return max(0, int((1 - WORKING_SHARE) * free_bytes) - weights - batch)


def fitting(sources: Sequence[ShuffledRows], memory_bytes: int) -> str | None:
    """How much of these rows is held: "all", "pools", or None if not even two pools fit."""
    row_bytes = sum(source.row_bytes + NUMBER_BYTES for source in sources)
    if sources[0].n_rows * row_bytes <= memory_bytes:
        return "all"
    return "pools" if SLOTS * sources[0].largest_pool_rows * row_bytes <= memory_bytes else None


class HeldPool(NamedTuple):
    """The part of the endless sequence of rows that one pool gives, from position `first` on."""

    first: int
    numbers: Tensor  # int32, on the device: the place there of each row, in their order
    contexts: np.ndarray  # int32, of each row

    @property
    def end(self) -> int:
        return self.first + len(self.numbers)


class ResidentRows:
    """The rows of one hook point on a device. One thread at a time may ask for batches."""

    def __init__(self, source: ShuffledRows, device: torch.device, *, everything: bool) -> None:
        self._source, self._place = source, _Place(source, device, everything=everything)
        self._pools: Iterator[HeldPool] = iter(())
        self._held: HeldPool | None = None

    def batch(self, step: int) -> tuple[Float[Tensor, "batch d_in"], Callable[[], float]]:
        """The rows of a step in float32, equal to those of `ShuffledRows.batch`, and how well they are mixed."""
        position, left = self._source.first_position(step), self._source.batch_rows
        parts, contexts = [], []
        while left:
            pool = self._pool_with(position)
            here = slice(position - pool.first, position - pool.first + left)
            # Gathered before the next pool is asked for, which may be copied to where this one lies.
            parts.append(self._place.gathered(pool.numbers[here]))
            contexts.append(pool.contexts[here])
            position, left = position + len(parts[-1]), left - len(parts[-1])
        return self._place.finished(parts), lambda: self._source.mixing(np.concatenate(contexts))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        """The rows that `ShuffledRows.sample` draws, in the memory of the host as those."""
        if not self._place.everything:
            return torch.from_numpy(self._source.sample(n, seed))
        self._place.fill()
        numbers = self._source.chosen_for_sample(n, seed)
        return self._place.finished([self._place.gathered(self._place.sent(numbers))]).cpu()

    def _pool_with(self, position: int) -> HeldPool:
        """The pool that has the row at a position; the one after it is read meanwhile."""
        held, self._held = self._held, None  # an error below must not leave a pool whose successor is lost
        if held is not None and position >= held.end:
            held = next(self._pools)
        if held is None or not held.first <= position < held.end:
            self._pools = _pools_from(self._place, position)
            held = next(self._pools)
        self._held = held
        return held


def _pools_from(place: _Place, position: int) -> Iterator[HeldPool]:
    """Pools in their order, beginning with the one that has this position."""

    def next_pool(n: int) -> HeldPool:
        nonlocal position
        pool = place.load(position, n % SLOTS)
        position = pool.end
        return pool

    return read_ahead(next_pool, count())


class _Place:
    """The memory in which rows lie."""

    def __init__(self, source: ShuffledRows, device: torch.device, *, everything: bool) -> None:
        self.everything, self._source, self._device = everything, source, device
        self._side = SideStream(device)
        self._rows: Tensor | None = None

    def load(self, position: int, slot: int) -> HeldPool:
        """Brings the rows of the pool at this position here, and says where they are."""
        source, place = self._source, self._source.slot(position)
        if self.everything:
            self.fill()
            numbers = source.numbers_of(place.pool)[place.order]
        else:
            first = slot * source.largest_pool_rows
            self._copy(source.read_pool(place.pool), SLOTS * source.largest_pool_rows, first)
            numbers = first + place.order
        contexts = source.contexts_of(place.pool)[place.order].astype(np.int32)
        return HeldPool(position - place.offset, self.sent(numbers), contexts)

    def fill(self) -> None:
        """Reads all kept rows, once."""
        if self._rows is None:
            self._copy(self._source.read_all(), self._source.n_rows, 0)

    def _copy(self, parts: Iterator[np.ndarray], capacity: int, first: int) -> None:
        """Copies rows, as they are read, to the places from `first` on."""
        rows = self._rows
        for part in parts:
            stored = _of_its_dtype(part, self._source.dtype)
            if rows is None:
                rows = torch.empty((capacity, stored.shape[1]), dtype=stored.dtype, device=self._device)
                self._side.follow()  # the memory may have been another's on the caller's stream
            with self._side.used():
                rows[first : first + len(stored)].copy_(page_locked(stored, self._device), non_blocking=True)
            first += len(stored)
        self._rows = rows  # only now: an error above must not leave half of them as if they were all

    def sent(self, numbers: np.ndarray) -> Tensor:
        """Row numbers on the device."""
        with self._side.used():
            return page_locked(torch.from_numpy(numbers.astype(np.int32)), self._device).to(
                self._device, non_blocking=True
            )

    def gathered(self, numbers: Tensor) -> Float[Tensor, "n d_in"]:
        """These rows in float32; the device may still be at it."""
        assert self._rows is not None
        with self._side.used():
            return self._rows.index_select(0, numbers).float()

    def finished(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts as one tensor that any stream may read."""
        with self._side.used():
            rows = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        self._side.finish()
        return self._side.share(rows)


def _of_its_dtype(stored: np.ndarray, dtype: str) -> Tensor:
    """Rows as a tensor; numpy has no bfloat16 and holds its bits."""
    if dtype == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)
