"""What a trainer reads: rows of activations, by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sae.dictionary.sites import Site
from store.common import read_ahead

BATCHES_AHEAD = 3  # a running model makes no batch or two at once: three waiting batches even that out

Downstream = Callable[[Tensor, Tensor], Tensor]  # (x, resid) → logits, in the model's own units


class Batch(NamedTuple):
    """The rows of one step, in the model's own units.

    `y` is the target where it is not x (transcoders); `resid` is the residual stream that `ModelRows.downstream` takes.
    `mixing` counts the distinct contexts among the rows, as a share of a perfect shuffle's: a function, because only a
    line of the log asks for it. None where rows have no contexts.
    """

    x: Float[Tensor, "batch d_in"]
    y: Float[Tensor, "batch d_out"] | None = None
    resid: Float[Tensor, "batch d_model"] | None = None
    mixing: Callable[[], float] | None = None


class Rows(Protocol):
    """A source of training rows: a store, a running model, or any object with these three members."""

    d_in: int

    def batch(self, step: int) -> Batch:
        """The batch of a step: a pure function of (source, seed, step), so that a run can resume anywhere."""
        ...

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        """n rows drawn uniformly (or all, if there are fewer): a pure function of the seed."""
        ...


@runtime_checkable
class TargetRows(Rows, Protocol):
    """Rows that also have a target y for each x, as transcoders need; their batches have `y`."""

    d_out: int

    def sample_targets(self, n: int, seed: int) -> Float[Tensor, "n d_out"]:
        """y of the rows that `sample` draws."""
        ...


@runtime_checkable
class SiteRows(Rows, Protocol):
    """Rows that join several sites, as crosscoders need: the values of each site, in order, times its scale."""

    sites: Sequence[Site]


@runtime_checkable
class ModelRows(Rows, Protocol):
    """Rows that can come with the rest of their model, for end-to-end training; their batches then have `resid`."""

    downstream: Downstream | None


def samples_together(rows: Rows) -> bool:
    """Whether each rank reads its own part of a sample, so that all ranks ask for it, or none."""
    return bool(getattr(rows, "samples_together", False))


class OwnRows:
    """One rank's part of every batch of `rows`, which each rank reads whole; samples are of all rows.

    For rows that cannot be read in parts: a store's can (`sae.pipeline.open_rows`).
    """

    def __init__(self, rows: Rows, rank: int, world: int) -> None:
        self._rows, self._rank, self._world = rows, rank, world
        for name in ("d_in", "d_out", "sample", "sample_targets", "downstream", "sites"):
            if hasattr(rows, name):
                setattr(self, name, getattr(rows, name))

    def batch(self, step: int) -> Batch:
        batch = self._rows.batch(step)
        n = len(batch.x) // self._world
        part = slice(self._rank * n, (self._rank + 1) * n)
        y, resid = (None if rows is None else rows[part] for rows in (batch.y, batch.resid))
        return Batch(batch.x[part], y, resid, batch.mixing)

    d_in: int
    sample: Callable[[int, int], Tensor]


def prefetched(rows: Rows, start: int, stop: int, *, pinned: bool = False) -> Iterator[tuple[Batch, float]]:
    """The batches of steps start … stop − 1, read while earlier ones are processed, and the seconds waited for each.

    `pinned` puts the rows into page-locked memory, from which a GPU copies without blocking the program.
    """

    def locked(rows: Tensor | None) -> Tensor | None:
        return rows.pin_memory() if rows is not None and rows.device.type == "cpu" else rows

    def read(step: int) -> Batch:
        batch = rows.batch(step)
        x, y, resid = (locked(part) if pinned else part for part in batch[:3])
        assert x is not None
        return Batch(x, y, resid, batch.mixing)

    batches = read_ahead(read, range(start, stop), pieces=BATCHES_AHEAD)
    for _ in range(start, stop):
        asked = time.perf_counter()
        batch = next(batches)
        yield batch, time.perf_counter() - asked
