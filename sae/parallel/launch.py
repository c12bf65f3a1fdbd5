"""The ranks that torchrun started: how they join, and how all of them stop when one does."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from hashlib import sha256
from itertools import count
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sae.jobs.progress import Interrupted
from sae.jobs.ranks import rank_and_world
from sae.parallel.cost import cheapest, exchanged_bytes
from sae.parallel.mesh import ONE, TIMEOUT, FailedElsewhere, Mesh, answer_limit

ROLL_CALL_S = 3.0  # within which every rank that still runs answers
LAST_SECONDS = 20.0  # after SIGTERM: torchrun kills 30 s after it
SHARD_FORMS = "features, rows, auto, or RxF such as 2x4"


class RankStopped(ValueError):
    """Another rank died, raised or does not answer."""


def ranks_here() -> int:
    """How many of the processes that torchrun started are on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or rank_and_world()[1])


@contextmanager
def own_gpu(device: str) -> Iterator[bool]:
    """Inside, CUDA means the GPU of this process' LOCAL_RANK; whether there is one."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    with torch.cuda.device(int(os.environ.get("LOCAL_RANK") or 0)) if on_gpu else nullcontext():
        yield on_gpu


def check_started(shard: str | None) -> None:
    """Raises: ValueError unless `shard` is given if and only if torchrun started this process."""
    rank, world = rank_and_world()
    if shard is None and world > 1:
        raise ValueError(
            f"{world} processes were started (WORLD_SIZE) and --shard is not given, which says how they train one "
            f"dictionary together: {SHARD_FORMS}. To train several dictionaries, start `sae sweep` this way."
        )
    if shard is not None and "RANK" not in os.environ:
        raise ValueError(
            f"--shard {shard} divides the training among processes that torchrun starts. Start it with: torchrun "
            f"--standalone --nproc-per-node N -m sae.cli train … --shard {shard}"
        )
    assert 0 <= rank < world


def mesh_shape(shard: str, *, d_in: int, d_sae: int, batch_tokens: int, k: int) -> tuple[int, int]:
    """(row groups, shards) for `--shard`. Raises: ValueError naming what would fit."""
    _, world = rank_and_world()
    if shard == "auto":
        found = cheapest(world, ranks_here(), d_in=d_in, d_sae=d_sae, batch_tokens=batch_tokens, k=k)
    elif shard in ("features", "rows"):
        found = (1, world) if shard == "features" else (world, 1)
    elif match := re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", shard):
        found = int(match[1]), int(match[2])
    else:
        raise ValueError(f"--shard must be one of {SHARD_FORMS}; got {shard!r}.")
    if found[0] * found[1] != world:
        fitting = ", ".join(f"{world // n}x{n}" for n in range(1, world + 1) if world % n == 0)
        raise ValueError(f"--shard {shard} needs {found[0] * found[1]} processes, and {world} run. Use {fitting}.")
    if batch_tokens % world:
        lower = max(world, batch_tokens // world * world)
        raise ValueError(
            f"a batch of {batch_tokens:,} rows cannot be divided evenly among {world} processes. Use --batch-tokens "
            f"{lower} or {lower + world}."
        )
    if found[1] > d_sae:
        raise ValueError(f"{d_sae:,} features cannot be divided among {found[1]} shards. Use fewer shards.")
    return found


@contextmanager
def joined_ranks(shard: str | None, device: str, **sizes: int) -> Iterator[Mesh]:
    """The mesh of the processes that torchrun started, as `--shard` says; one rank without it.

    `device` is auto, cpu or cuda; with CUDA each process takes the GPU of its LOCAL_RANK. When a rank fails inside,
    it says why, and the others stop with an error that names it.
    Raises: ValueError for a wrong `shard`; RankStopped when another rank stopped; FailedElsewhere when another
    rank says so already.
    """
    check_started(shard)
    if shard is None or rank_and_world()[1] == 1:
        yield ONE
        return
    shape = mesh_shape(shard, **sizes)
    with _joined(shape, device, reason=_reason(shape, **sizes) if shard == "auto" else "") as mesh:
        yield mesh


def _reason(shape: tuple[int, int], **sizes: int) -> str:
    """Why `auto` chose this mesh: what reaches a rank in a step, on it and on the meshes of one axis."""
    world = shape[0] * shape[1]
    meshes = dict.fromkeys([shape, (1, world), (world, 1)])
    bytes_of = {f"{r}x{f}": sum(exchanged_bytes(r, f, **sizes).values()) for r, f in meshes}
    chosen, *others = (f"{n / 1e6:,.1f} MB on {mesh}" for mesh, n in bytes_of.items())
    return f"; auto: {chosen} reach a rank in a step, {', '.join(others)}"


@contextmanager
def all_ranks(device: str) -> Iterator[Mesh]:
    """The processes that torchrun started as a mesh of equal workers; one rank without it.

    Where `joined_ranks` leaves it to the work to stop on SIGTERM, here the signal raises Interrupted.
    """
    _, world = rank_and_world()
    if dist.is_initialized():  # by the script that calls us
        yield Mesh(dist.get_world_size(), 1)
        return
    if world == 1:
        yield ONE
        return
    with _joined((world, 1), device, stop=True) as mesh:
        yield mesh


@contextmanager
def _joined(shape: tuple[int, int], device: str, *, stop: bool = False, reason: str = "") -> Iterator[Mesh]:
    with own_gpu(device) as on_gpu, _in_a_group(shape, on_gpu, stop, reason) as mesh:
        yield mesh


_groups = count()  # that this process has joined: all ranks join them in one order


@cache
def _store_of_torchrun() -> Any:
    """The store through which ranks find each other, opened once in a process."""
    store, _, _ = next(rendezvous("env://"))
    return store


@contextmanager
def _in_a_group(shape: tuple[int, int], on_gpu: bool, stop: bool, reason: str) -> Iterator[Mesh]:
    rank, world = rank_and_world()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    # A script may train, then evaluate: a second group that finds the addresses of the first one hangs.
    store = PrefixStore(f"group/{next(_groups)}", _store_of_torchrun())
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=answer_limit(patient=True))
    roll = RollCall(PrefixStore("sae", store), rank, world)
    mesh = Mesh(*shape)
    with _last_seconds(stop), warnings.catch_warnings():
        if rank:
            warnings.simplefilter("ignore")
        elif not stop:
            sys.stderr.write(f"mesh {mesh}: {_described(*shape)}{reason}\n")
        try:
            yield mesh
        except (FailedElsewhere, Interrupted):
            raise
        except Exception as error:
            found = roll.who_stopped(error, mesh) if _is_exchange(error) else roll.failed(error, mesh)
            if found is error:
                raise
            raise found from error
    dist.destroy_process_group()


def _is_exchange(error: Exception) -> bool:
    """Whether an exchange failed: gloo and NCCL raise RuntimeError when a rank is gone or does not answer."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return isinstance(error, RuntimeError) and where.startswith("torch.distributed")


def _described(row_groups: int, shards: int) -> str:
    """What each rank holds."""
    features = "all features" if shards == 1 else f"1/{shards} of the features"
    return f"each of {row_groups * shards} processes reads 1/{row_groups * shards} of the rows and holds {features}"


class RollCall:
    """Finds out which rank stopped, through the store that torchrun keeps."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        store.set(f"place/{rank}", f"{socket.gethostname()}, {_place()}")

    def failed(self, error: Exception, mesh: Mesh) -> Exception:
        """The error to raise for one of this rank's own; what all ranks raise alike is reported by the first."""
        said = sha256(f"{type(error)} {error}".encode()).hexdigest()
        self.store.set(f"fault/{self.rank}", "1")
        if self.store.add(f"said/{said}", 1) > 1:
            return FailedElsewhere(str(error))
        if not mesh.doing or not isinstance(error, (ValueError, OSError)):
            return error
        place = self._place_of(self.rank)
        return RankStopped(
            f"rank {self.rank} ({place}) failed in {mesh.doing}: {str(error).rstrip('.')}. {_advice(mesh)}"
        )

    def who_stopped(self, error: Exception, mesh: Mesh) -> Exception:
        """The error to raise after a failed exchange: one rank reports it, the others are silent."""
        ending = threading.Timer(
            LAST_SECONDS, self._end, (mesh,)
        )  # without the store's machine a call may never return
        ending.daemon = True
        ending.start()
        try:
            return self._who_stopped(error, mesh)
        finally:
            ending.cancel()

    def _end(self, mesh: Mesh) -> None:
        sys.stderr.write(f"sae: rank {self.rank}: the machine of rank 0 stopped answering. {_advice(mesh)}\n")
        sys.stderr.flush()
        os._exit(2)

    def _who_stopped(self, error: Exception, mesh: Mesh) -> Exception:
        try:
            self.store.set(f"here/{self.rank}", "1")
            time.sleep(ROLL_CALL_S)
            faults = [rank for rank in range(self.world) if self.store.check([f"fault/{rank}"])]
            if faults:
                return FailedElsewhere(f"rank {faults[0]} failed")
            here = [rank for rank in range(self.world) if self.store.check([f"here/{rank}"])]
            gone = [rank for rank in range(self.world) if rank not in here]
            if here and self.rank != here[0]:
                return FailedElsewhere("another rank reports it")
            at = f" in {mesh.doing}" if mesh.doing else ""
            if not gone:
                return RankStopped(
                    f"an exchange between ranks failed{at}, though all of them answer: {error}. {_advice(mesh)} If it "
                    f"only took long, allow more seconds with {TIMEOUT}."
                )
            named = ", ".join(f"rank {rank} ({self._place_of(rank)})" for rank in gone)
        except (RuntimeError, OSError):  # the machine that keeps the store is gone
            return RankStopped(f"the machine of rank 0 stopped answering ({error}). {_advice(mesh)}")
        return RankStopped(
            f"{named} stopped answering{at}: it was killed, ran out of memory or hangs, or its machine or network "
            f"failed. {_advice(mesh)}"
        )

    def _place_of(self, rank: int) -> str:
        return str(self.store.get(f"place/{rank}").decode()) if self.store.check([f"place/{rank}"]) else "unknown"


def _advice(mesh: Mesh) -> str:
    return f"{mesh.kept} Repeat the command, on as many ranks or on others.".strip()


def _place() -> str:
    on_gpu = torch.cuda.is_available() and dist.get_backend() != "gloo"
    return f"cuda:{torch.cuda.current_device()}" if on_gpu else f"process {os.getpid()}"


@contextmanager
def _last_seconds(stop: bool) -> Iterator[None]:
    """Inside, the first SIGTERM leaves LAST_SECONDS to stop: a rank may wait for one that is gone.

    With `stop` it also raises Interrupted; otherwise the work itself looks for the signal.
    """

    def end(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(LAST_SECONDS, os._exit, (128 + signal.SIGTERM,))
        timer.daemon = True
        timer.start()
        if stop:
            raise Interrupted("stopped; nothing was written. Repeat the command.")

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
