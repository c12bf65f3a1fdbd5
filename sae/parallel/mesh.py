"""The processes (ranks) of one training as a mesh, and everything they do together.

Rows are always split over all ranks. A row group is the ranks that hold one whole dictionary between them, a shard of
its features each: the rows of a group are gathered on the way into the dictionary, and each rank gets its own rows of
the summed partial reconstructions on the way out.

Losses are means over a rank's own rows, and the loss of a step is the mean over ranks. With one rank (`ONE`) every
operation returns what it was given.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

Axis = Literal["features", "rows", "world"]  # the ranks of a row group; the ranks with the same shard; all ranks
OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before PyTorch 2.13

TIMEOUT = "SAE_RANK_TIMEOUT_S"
TIMEOUT_S = 300.0  # without an answer, in a step
PATIENCE = 4  # times as long before the first step and while files are written

Told = TypeVar("Told")


def answer_limit(*, patient: bool) -> timedelta:
    """How long a rank waits for the others. Raises: ValueError if the environment names no such time."""
    given = os.environ.get(TIMEOUT) or TIMEOUT_S
    try:
        seconds = float(given)
        assert seconds > 0
        return timedelta(seconds=seconds * (PATIENCE if patient else 1))
    except (ValueError, AssertionError, OverflowError) as error:
        raise ValueError(f"{TIMEOUT} must be a number of seconds above 0, got {given!r}.") from error


class FailedElsewhere(ValueError):
    """What stopped another rank, which says so itself."""

    reported_elsewhere = True


class Mesh:
    """`row_groups` × `shards` ranks: rank = row_group · shards + shard, so that a row group is neighbouring ranks.

    `calls` and `received_bytes` count what was exchanged, by operation: the bytes are those that reach one rank when a
    sum over n ranks is exchanged as a ring (2 (n − 1) / n of the tensor).
    Raises: ValueError if the process group has another number of ranks.
    """

    def __init__(self, row_groups: int = 1, shards: int = 1) -> None:
        self.row_groups, self.shards, self.world = row_groups, shards, row_groups * shards
        started = dist.get_world_size() if self.world > 1 else 1
        if self.world != started:
            raise ValueError(
                f"a mesh of {row_groups}x{shards} has {self.world} ranks, and {started} processes were started."
            )
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.row_group, self.shard = divmod(self.rank, shards)
        self._groups: dict[Axis, Any] = {"world": None, "features": None, "rows": None}  # None: all ranks
        if row_groups > 1 and shards > 1:  # every rank makes every group, in one order
            by_features = [dist.new_group(list(range(r * shards, (r + 1) * shards))) for r in range(row_groups)]
            by_rows = [dist.new_group(list(range(f, self.world, shards))) for f in range(shards)]
            self._groups |= {"features": by_features[self.row_group], "rows": by_rows[self.shard]}
        self.doing, self.kept = "", ""  # for the error of a failed exchange: what this rank is at, and what is saved
        self.exchange_s = 0.0  # in exchanges so far, mostly waiting for slower ranks
        self.calls: Counter[str] = Counter()
        self.received_bytes: Counter[str] = Counter()

    def __str__(self) -> str:
        return f"{self.row_groups}x{self.shards}"

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes, logs and draws the progress bar."""
        return self.rank == 0

    def features(self, d_sae: int, shard: int | None = None) -> range:
        """The features of a shard (by default this rank's): even parts, the first ones larger by one if need be."""
        which = self.shard if shard is None else shard
        even, more = divmod(d_sae, self.shards)
        start = which * even + min(which, more)
        return range(start, start + even + (which < more))

    def size(self, axis: Axis) -> int:
        return {"features": self.shards, "rows": self.row_groups, "world": self.world}[axis]

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, an exchange may wait for other ranks as long as at the start: they read or write much."""
        self.answer_within(patient=True)
        try:
            yield
        finally:
            self.answer_within(patient=False)

    def answer_within(self, *, patient: bool) -> None:
        """Sets how long an exchange may wait for other ranks from now on, until it fails."""
        if self.world > 1:
            for group in set(self._groups.values()):
                _set_pg_timeout(answer_limit(patient=patient), group)

    # --- rows into the dictionary, reconstructions out of it ---------------------------------------------------------

    def gather_rows(self, x: Float[Tensor, "own d"]) -> Float[Tensor, "gathered d"]:
        """The rows of all ranks of the row group, in the order of ranks. Without a gradient for x."""
        if self.shards == 1:
            return x
        out = x.new_empty((len(x) * self.shards, *x.shape[1:]))
        with self._exchange("gather_rows", (self.shards - 1) * _bytes(x)):
            all_gather(out, x.contiguous(), group=self._groups["features"])
        return out

    def scatter_sum(self, partial: Float[Tensor, "gathered ..."]) -> Float[Tensor, "own ..."]:
        """This rank's own rows of the sum over the shards. Differentiable: the gradients of rows are gathered.

        Summands are added in the order of ranks, so that the result has the same bits on every transport.
        """
        if self.shards == 1:
            return partial
        found: Tensor = _ScatterSum.apply(partial, self)  # type: ignore[no-untyped-call]
        return found

    def scatter_sums(self, partials: Sequence[Float[Tensor, "gathered d"]]) -> list[Float[Tensor, "own d"]]:
        """`scatter_sum` of several tensors in one exchange."""
        if self.shards == 1:
            return list(partials)
        return list(self.scatter_sum(torch.stack(list(partials), 1)).unbind(1))

    def own_rows(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "own d"]:
        """This rank's part of rows that all ranks hold; the last row is repeated where parts would be unequal."""
        if self.world == 1:
            return x
        each = -(-len(x) // self.world)
        places = torch.arange(self.rank * each, (self.rank + 1) * each, device=x.device)
        return x[places.clamp_max(len(x) - 1)]

    def all_rows(self, own: Float[Tensor, "own ..."], n: int) -> Float[Tensor, "n ..."]:
        """The inverse of `own_rows`: n rows from the parts of all ranks."""
        return own if self.world == 1 else self.stack(own, "world").flatten(0, 1)[:n]

    def joined(self, own: Float[Tensor, "own ..."], lengths: Sequence[int]) -> Float[Tensor, "all ..."]:
        """The rows of all ranks in their order; `lengths` says how many each has."""
        if self.world == 1:
            return own
        padded = own.new_zeros((max(lengths), *own.shape[1:]))
        padded[: len(own)] = own
        return torch.cat([rows[:n] for rows, n in zip(self.stack(padded, "world"), lengths, strict=True)])

    # --- numbers -----------------------------------------------------------------------------------------------------

    def reduce(self, x: Tensor, operation: str, axis: Axis) -> Tensor:
        """The sum, max or min over the ranks of an axis, the same bits on each of them."""
        return x if self.size(axis) == 1 else self.reduce_(x.clone(), operation, axis)

    def reduce_(self, x: Tensor, operation: str, axis: Axis) -> Tensor:
        """`reduce` in place, for a contiguous tensor."""
        n = self.size(axis)
        if n > 1:
            with self._exchange("reduce", 2 * (n - 1) * _bytes(x) // n):
                dist.all_reduce(x, OPERATIONS[operation], group=self._groups[axis])
        return x

    def average(self, x: Tensor) -> Tensor:
        """The mean over all ranks, which have equally many rows: of means over own rows, the mean over all rows."""
        return x if self.world == 1 else self.reduce(x, "sum", "world") / self.world

    def mean_of_features(self, x: Float[Tensor, " own"]) -> Float[Tensor, ""]:
        """The mean of one number per feature over the features of all shards."""
        if self.shards == 1:
            return x.mean()
        total = self.reduce(torch.stack([x.sum(), x.new_tensor(float(len(x)))]), "sum", "features")
        return total[0] / total[1]

    def over_shards(self, term: Tensor) -> Tensor:
        """A loss term that sums over this shard's features, scaled so that its mean over ranks sums over all shards."""
        return term if self.shards == 1 else term * self.shards

    def stack(self, x: Tensor, axis: Axis) -> Tensor:
        """Everyone's x along a new first dimension, in the order of ranks."""
        n = self.size(axis)
        if n == 1:
            return x[None]
        out = x.new_empty((n * x.numel(),))
        with self._exchange("stack", (n - 1) * _bytes(x)):
            all_gather(out, x.contiguous().flatten(), group=self._groups[axis])
        return out.view(n, *x.shape)

    def all_features(self, own: Shaped[Tensor, "own ..."], d_sae: int) -> Shaped[Tensor, "d_sae ..."]:
        """What each shard holds of its features, for all features."""
        if self.shards == 1:
            return own
        padded = own.new_zeros((len(self.features(d_sae, 0)), *own.shape[1:]))
        padded[: len(own)] = own
        parts = self.stack(padded, "features")
        return torch.cat([part[: len(self.features(d_sae, shard))] for shard, part in enumerate(parts)])

    # --- decisions ---------------------------------------------------------------------------------------------------

    def agree(self, flag: bool | Tensor) -> bool:
        """Whether the flag is true on any rank. All ranks leave the loop, save or raise together, or none does."""
        if self.world == 1:
            return bool(flag)
        return bool(self.reduce_(torch.tensor([int(flag)]), "max", "world"))

    def tell(self, value: Told) -> Told:
        """Rank 0's value (of JSON types) on every rank; what the others pass is ignored."""
        if self.world == 1:
            return value
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(raw)])
        dist.broadcast(length, 0)
        text = raw if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, 0)
        found: Told = json.loads(text.numpy().tobytes())
        return found

    def tell_numbers(self, x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Rank 0's whole numbers on every rank."""
        return x if self.world == 1 else torch.tensor(self.tell(x.tolist()), dtype=x.dtype, device=x.device)

    def everyones(self, value: Told) -> list[Told]:
        """The values (of JSON types) of all ranks, in their order."""
        if self.world == 1:
            return [value]
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.stack(torch.tensor(len(raw)), "world").tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(raw)] = raw
        rows = self.stack(padded, "world").numpy()
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def on_first(self, work: Callable[[], Told]) -> Told:
        """What `work` returns on rank 0 (of JSON types), on every rank.

        Raises: ValueError or OSError as `work` does, on rank 0; FailedElsewhere with the same message on the others.
        """
        found: Told | None = None
        failed: Exception | None = None
        try:
            found = work() if self.is_first else None
        except (ValueError, OSError) as error:
            failed = error
        if fault := self.tell(str(failed) if failed else ""):
            raise failed or FailedElsewhere(fault)
        return self.tell(found)  # type: ignore[return-value]

    def send_first(self, x: Tensor) -> Tensor:
        """Rank 0's tensor in place of x, which has the same shape and type on every rank."""
        if self.world > 1:
            dist.broadcast(x, 0)
        return x

    def to_first(self, x: Tensor, *, owner: int) -> Tensor:
        """On rank 0 the x of the rank `owner`; the others return what they passed."""
        if owner != 0 and self.rank == owner:
            dist.send(x, 0)
        elif owner != 0 and self.is_first:
            dist.recv(x, owner)
        return x

    def collected(self, own: Shaped[np.ndarray, "n ..."]) -> list[np.ndarray]:
        """On rank 0 the arrays of all ranks, in their order, which may differ in length; [] on the others."""
        if self.world == 1:
            return [own]
        shapes = self.everyones(list(own.shape))
        if not self.is_first:
            if own.nbytes:
                dist.send(torch.from_numpy(np.ascontiguousarray(own).view(np.uint8).reshape(-1)), 0)
            return []
        found = [own]
        for rank, shape in enumerate(shapes[1:], 1):
            theirs = np.empty(shape, own.dtype)
            if theirs.nbytes:
                dist.recv(torch.from_numpy(theirs.reshape(-1).view(np.uint8)), rank)
            found.append(theirs)
        return found

    def in_order(self, own: Sequence[np.ndarray], like: np.ndarray) -> list[np.ndarray]:
        """On rank 0 the pieces of all ranks, whose i-th is piece i · world + rank of the whole; [] on the others.

        `like` is an empty array of their dtype and shape, for a rank without pieces.
        """
        if self.world == 1:
            return list(own)
        lengths = self.collected(np.array([len(piece) for piece in own], np.int64))
        parts = self.collected(np.concatenate([like, *own]))
        pieces = [np.split(part, np.cumsum(n)[:-1]) if len(n) else [] for part, n in zip(parts, lengths, strict=True)]
        return [theirs[i] for i in range(max(map(len, pieces), default=0)) for theirs in pieces if i < len(theirs)]

    @contextmanager
    def _exchange(self, what: str, n_bytes: int) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.exchange_s += time.perf_counter() - began
        self.calls[what] += 1
        self.received_bytes[what] += n_bytes


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        parts = torch.empty_like(partial, memory_format=torch.contiguous_format)
        with mesh._exchange("scatter_sum", (mesh.shards - 1) * _bytes(partial) // mesh.shards):
            dist.all_to_all_single(parts, partial.contiguous(), group=mesh._groups["features"])
        parts = parts.view(mesh.shards, len(partial) // mesh.shards, *partial.shape[1:])
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.mesh.gather_rows(gradient), None


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


ONE = Mesh()
