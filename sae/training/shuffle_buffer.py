"""A stream of rows in mixed order: which batch each of them goes to, and the buffer in which they wait for it.

Neighbours in text are neighbours in a stream; in a batch they would say the same thing twice. So the stream is taken in
blocks of a batch's size, and the rows of block j are spread at random over the batches j … j + n − 1: a batch holds as
many rows of each of the n newest blocks. A buffer of (n − 1) / 2 batches thereby mixes as one of n − 1 that is emptied
before it is filled again, and every step takes in as much as it hands out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Blocks of `batch_rows` rows, each over the `batches` next batches: a pure function of the seed.

    Block −1 is what the buffer is filled with at the start: the rows that batches 0 … n − 2 lack of earlier blocks.
    """

    batch_rows: int
    batches: int
    seed: int

    @property
    def _shares(self) -> Int[np.ndarray, " batches"]:
        """Rows that a block gives to each of its batches."""
        n = np.arange(self.batches)
        return self.batch_rows // self.batches + (n < self.batch_rows % self.batches)

    @property
    def waiting_rows(self) -> int:
        """Rows in the buffer between two batches: about `batch_rows · (batches − 1) / 2`."""
        return int((self.batch_rows - np.cumsum(self._shares)).sum())

    def first_row(self, block: int) -> int:
        """Where in the stream a block begins."""
        return 0 if block < 0 else self.waiting_rows + block * self.batch_rows

    def first_block(self, batch: int) -> int:
        """The oldest block that a batch has rows of."""
        return max(-1, batch - self.batches + 1)

    def batches_of(self, block: int) -> Int[np.ndarray, " rows"]:
        """The batch to which each row of a block goes."""
        counts = self._shares if block >= 0 else self.batch_rows - np.cumsum(self._shares)
        numbers = np.repeat(max(block, 0) + np.arange(self.batches), counts)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, block + 1)))).permutation(
            numbers
        )

    def deal(self, stream: Iterable[Tensor], block: int) -> Iterator[tuple[Tensor, Int[np.ndarray, " rows"]]]:
        """Parts of a stream that begins with `block`, and the batch to which each row goes."""
        batches = self.batches_of(block)
        for rows in stream:
            while len(rows):
                part, rows = rows[: len(batches)], rows[len(batches) :]
                yield part, batches[: len(part)]
                batches = batches[len(part) :]
                if not len(batches):
                    block += 1
                    batches = self.batches_of(block)


class MixingBuffer:
    """The rows that wait, on the device and in the dtype they come in; `take` gives batch after batch from `batch` on.

    The stream begins with the first row of the oldest block that the first batch has rows of. The order of rows in a
    batch is that of the stream, so that a batch does not depend on where reading began.
    """

    def __init__(self, spread: Spread, batch: int, stream: Iterable[Tensor]) -> None:
        self._spread, self.batch = spread, batch
        block = spread.first_block(batch)
        self._received = spread.first_row(block)
        self._dealt = spread.deal(stream, block)
        places = spread.waiting_rows + spread.batch_rows
        self._rows: Tensor | None = None
        self._row = np.zeros(places, np.int64)  # of the stream
        self._due = np.full(places, -1)  # the batch a place's row waits for; below the next batch: the place is free

    def take(self) -> Float[Tensor, "batch_rows width"]:
        """The next batch."""
        while self._received < self._spread.first_row(self.batch + 1):
            self._put(*next(self._dealt))
        places = np.flatnonzero(self._due == self.batch)
        places = places[np.argsort(self._row[places])]
        self.batch += 1
        assert self._rows is not None
        return self._rows[torch.from_numpy(places).to(self._rows.device)]

    def _put(self, rows: Tensor, due: np.ndarray) -> None:
        numbers = self._received + np.arange(len(rows))
        self._received += len(rows)
        wanted = due >= self.batch  # where reading begins in the middle, batches before it are done
        places = np.flatnonzero(self._due < self.batch)[: np.count_nonzero(wanted)]
        self._row[places], self._due[places] = numbers[wanted], due[wanted]
        if self._rows is None:
            self._rows = torch.empty((len(self._row), rows.shape[1]), dtype=rows.dtype, device=rows.device)
        chosen, into = (torch.from_numpy(n).to(rows.device) for n in (np.flatnonzero(wanted), places))
        self._rows.index_copy_(0, into, rows[chosen])
