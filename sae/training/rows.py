"""What a trainer reads: rows of activations, by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from store.common import read_ahead

BATCHES_AHEAD = 3  # a running model makes two batches or none: three waiting even that out


class Batch(NamedTuple):
    """One step's rows; `y` is the target where it is not x (transcoders), `resid` and `tokens` for recipes that ask.

    `mixing`: distinct contexts among the rows, as a share of a perfect shuffle's; None where they come of none.
    """

    x: Float[Tensor, "batch d_in"]
    y: Float[Tensor, "batch d_out"] | None = None
    resid: Float[Tensor, "batch d_model"] | None = None
    tokens: Int[Tensor, " batch"] | None = None
    mixing: float | None = None


class Rows(Protocol):
    """A source of training rows: the store, a live model, or a test."""

    d_in: int

    def batch(self, step: int) -> Batch:
        """The batch of a step: a pure function of (source, seed, step), so a run resumes anywhere."""
        ...

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        """n rows drawn uniformly: a pure function of the seed."""
        ...


def prefetched(rows: Rows, start: int, stop: int, *, pinned: bool = False) -> Iterator[tuple[Batch, float]]:
    """The batches of steps start … stop − 1, read while the ones before are worked on, and the seconds waited.

    `pinned` puts x into page-locked memory, from which a GPU copies without holding up the program.
    """

    def read(step: int) -> Batch:
        batch = rows.batch(step)
        return batch._replace(x=batch.x.pin_memory()) if pinned and batch.x.device.type == "cpu" else batch

    batches = read_ahead(read, range(start, stop), pieces=BATCHES_AHEAD)
    for _ in range(start, stop):
        asked = time.perf_counter()
        batch = next(batches)
        yield batch, time.perf_counter() - asked
