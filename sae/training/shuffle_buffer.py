"""A stream of rows in shuffled order: a plan of the batch each row goes to, and the buffer in which rows wait for it.

Neighbours in a text are neighbours in its stream of rows, and a batch of similar rows teaches little. So the stream is
cut into blocks of a batch's size, and the rows of block j are spread at random over the batches j … j + n − 1: a batch
holds equally many rows of each of the n newest blocks. So a buffer of (n − 1) / 2 batches shuffles as well as one of
n − 1 batches that is emptied and refilled, and every step reads as many rows as it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Num
from torch import Tensor


@dataclass(frozen=True)
class ShufflePlan:
    """Spreads each block of `batch_rows` rows over the next `batches` batches: a pure function of the seed.

    Block −1 fills the buffer at the start: it replaces the earlier blocks, which batches 0 … n − 2 do not have.
    """

    batch_rows: int
    batches: int
    seed: int

    @property
    def _shares(self) -> Int[np.ndarray, " batches"]:
        """How many rows a block gives to each of its batches."""
        n = np.arange(self.batches)
        return self.batch_rows // self.batches + (n < self.batch_rows % self.batches)

    @property
    def waiting_rows(self) -> int:
        """Rows in the buffer between two batches: about `batch_rows · (batches − 1) / 2`."""
        return int((self.batch_rows - np.cumsum(self._shares)).sum())

    def first_row(self, block: int) -> int:
        """The number of the first row of a block in the stream."""
        return 0 if block < 0 else self.waiting_rows + block * self.batch_rows

    def first_block(self, batch: int) -> int:
        """The oldest block with rows in a batch."""
        return max(-1, batch - self.batches + 1)

    def batches_of(self, block: int) -> Int[np.ndarray, " rows"]:
        """The batch to which each row of a block goes."""
        counts = self._shares if block >= 0 else self.batch_rows - np.cumsum(self._shares)
        numbers = np.repeat(max(block, 0) + np.arange(self.batches), counts)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, block + 1)))).permutation(
            numbers
        )

    def assign(self, stream: Iterable[Tensor], block: int) -> Iterator[tuple[Tensor, Int[np.ndarray, " rows"]]]:
        """Cuts a stream that begins with `block` into parts, each with the batch to which each of its rows goes."""
        batches = self.batches_of(block)
        for rows in stream:
            while len(rows):
                part, rows = rows[: len(batches)], rows[len(batches) :]
                yield part, batches[: len(part)]
                batches = batches[len(part) :]
                if not len(batches):
                    block += 1
                    batches = self.batches_of(block)


class ShuffleBuffer:
    """The rows that wait, on the device and in the dtype they came with; `take` returns batch after batch.

    `batch` is the number of the first batch; the stream must begin with the oldest block that has rows in it. The rows
    of a batch are in the order of the stream, so that a batch does not depend on where reading began.
    """

    def __init__(self, plan: ShufflePlan, batch: int, stream: Iterable[Tensor]) -> None:
        self._plan, self.batch = plan, batch
        block = plan.first_block(batch)
        self._received = plan.first_row(block)
        self._assigned = plan.assign(stream, block)
        places = plan.waiting_rows + plan.batch_rows
        self._rows: Tensor | None = None
        self._row = np.zeros(places, np.int64)  # its number in the stream
        self._due = np.full(places, -1)  # the batch that each place's row waits for: below `batch`, the place is free

    def take(self) -> Num[Tensor, "batch_rows width"]:
        """The next batch."""
        while self._received < self._plan.first_row(self.batch + 1):
            self._put(*next(self._assigned))
        places = np.flatnonzero(self._due == self.batch)
        places = places[np.argsort(self._row[places])]
        self.batch += 1
        assert self._rows is not None
        return self._rows[torch.from_numpy(places).to(self._rows.device)]

    def _put(self, rows: Tensor, due: np.ndarray) -> None:
        numbers = self._received + np.arange(len(rows))
        self._received += len(rows)
        wanted = due >= self.batch  # where reading began in the middle, rows of earlier batches are dropped
        places = np.flatnonzero(self._due < self.batch)[: np.count_nonzero(wanted)]
        self._row[places], self._due[places] = numbers[wanted], due[wanted]
        if self._rows is None:
            self._rows = torch.empty((len(self._row), rows.shape[1]), dtype=rows.dtype, device=rows.device)
        chosen, into = (torch.from_numpy(n).to(rows.device) for n in (np.flatnonzero(wanted), places))
        self._rows.index_copy_(0, into, rows[chosen])
