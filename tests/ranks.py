"""Ranks of a mesh as forked processes that talk through gloo, for tests of `sae.parallel`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest.mock import patch

import numpy.ma  # noqa: F401 - it and the next are imported late by what ranks call: once here, not once in each
import torch
import torch._dynamo  # noqa: F401
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sae.dictionary.autoencoder import SAE, WHOLE
from sae.dictionary.sites import Site
from sae.jobs.progress import Interrupted
from sae.kernels import reference
from sae.kernels.sparsity import BatchTopK, PreparedEncoder, Rule, Support, TopK
from sae.parallel.mesh import Axis, Mesh
from sae.training import loop
from sae.training.recipes import recipe_named, resolve
from sae.training.rows import Batch, OwnRows
from sae.training.state import TrainState, start
from sae.training.state_files import saved_header
from sae.training.step import resample_dead, train_step

TIMEOUT_S = 60


def on_ranks(n: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of n processes of one gloo group; raises what it raised in one."""
    with started(n, function, *arguments) as (processes, pipes):
        found = [receiving.recv() for receiving in pipes]
        for process in processes:
            process.join(TIMEOUT_S)
    wrong = [what for ok, what in found if not ok]
    assert not wrong, "\n".join(wrong)
    return [what for _, what in found]


def several(*calls: tuple[Any, ...]) -> list[Any]:
    """What each (function, arguments …) returns, one after another in one group of processes."""
    return [function(*arguments) for function, *arguments in calls]


@contextmanager
def started(n: int, function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[list[Any], list[Connection]]]:
    """n processes of one gloo group that call a function, and where each sends (True, its result) or (False, why)."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(paths)}):  # the server does not get our sys.path
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as directory:
        pipes = [context.Pipe(False) for _ in range(n)]
        processes = [
            context.Process(target=_rank, args=(rank, n, f"{directory}/store", pipe[1], function, arguments))
            for rank, pipe in enumerate(pipes)
        ]
        for process, (_, sending) in zip(processes, pipes, strict=True):
            process.start()
            sending.close()
        yield processes, [receiving for receiving, _ in pipes]


def _rank(rank: int, n: int, store: str, answer: Connection, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # a kill does not lose data in the kernel's buffers; only a power cut does
    try:
        if n > 1:
            dist.init_process_group("gloo", store=dist.FileStore(store, n), rank=rank, world_size=n)
        answer.send((True, function(*arguments)))
    except BaseException:
        answer.send((False, f"rank {rank}: {traceback.format_exc()}"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class ThreadMesh(Mesh):
    """One of many shards, each a thread of this process. `stacked` keeps the shape of each call of `stack`."""

    def __init__(self, shard: int, shards: int, meeting: Barrier, table: list[Any]) -> None:
        super().__init__()
        self.shard, self.shards, self.world, self.rank = shard, shards, shards, shard
        self._meeting, self._table = meeting, table
        self.stacked: list[tuple[int, ...]] = []

    def stack(self, x: Tensor, axis: Axis) -> Tensor:
        assert axis == "features"
        self.stacked.append(tuple(x.shape))
        return self._of_all(x)

    def reduce(self, x: Tensor, operation: str, axis: Axis) -> Tensor:
        assert (operation, axis) == ("sum", "features")
        return self._of_all(x).sum(0, dtype=x.dtype)

    def _of_all(self, x: Tensor) -> Tensor:
        self._table[self.shard] = x
        self._meeting.wait(TIMEOUT_S)
        found = torch.stack(self._table)  # fails for shapes that differ, as an exchange would
        self._meeting.wait(TIMEOUT_S)
        return found


def on_threads(shards: int, function: Callable[[ThreadMesh], Any]) -> list[Any]:
    """What `function(mesh)` returns for each of so many shards: where processes would take long to start."""
    meeting, table = Barrier(shards), [None] * shards

    def run(shard: int) -> Any:
        try:
            return function(ThreadMesh(shard, shards, meeting, table))
        except BaseException:
            meeting.abort()  # the others do not wait
            raise

    with ThreadPoolExecutor(shards) as pool:
        return list(pool.map(run, range(shards)))


# --- training on a mesh ----------------------------------------------------------------------------------------------


class StableKernels:
    """`reference`, but each pre-activation has the same bits in every shard, and the first of equal ones is kept."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def select(self, x: Tensor, encoder: PreparedEncoder, bias: Tensor, rule: Rule) -> tuple[Support, Tensor]:
        pre = (x[:, :, None] * encoder.W_enc).sum(1) + bias
        if isinstance(rule, TopK):
            kept = _first_largest(pre.relu(), rule.k)
        elif isinstance(rule, BatchTopK):
            kept = _first_largest(rule.rank(pre).reshape(1, -1), rule.k * len(x)).view_as(pre)
        else:
            kept = pre > rule.threshold
        return Support.of(kept), pre[kept]


def _first_largest(values: Tensor, k: int) -> Tensor:
    order = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, True) & (values > 0)


class PlantedRows:
    """Sparse sums of planted directions; a target and a residual stream are linear in x."""

    d_in = d_out = 8
    sites = (Site("a", 5, 1.0), Site("b", 3, 1.0))  # of a crosscoder

    def __init__(self, batch_tokens: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.batch_tokens = batch_tokens
        self.truth = torch.nn.functional.normalize(torch.randn(20, self.d_in, generator=generator), dim=-1)
        self.mix = torch.randn(self.d_in, self.d_in, generator=generator) / self.d_in**0.5

    def batch(self, step: int) -> Batch:
        x = self.sample(self.batch_tokens, 1000 + step)
        return Batch(x, x @ self.mix, x @ self.mix.T)

    def sample(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        n = min(n, 256)
        on = torch.rand(n, len(self.truth), generator=generator) < 0.15
        noise = 0.05 * torch.randn(n, self.d_in, generator=generator)
        return (on * (0.5 + torch.rand(n, len(self.truth), generator=generator))) @ self.truth + noise

    def sample_targets(self, n: int, seed: int) -> Tensor:
        return self.sample(n, seed) @ self.mix

    def downstream(self, x: Tensor, resid: Tensor) -> Tensor:
        return (x + resid) @ self.mix


class PermutedRows(PlantedRows):
    """The same rows in the order `number` within each batch: what rounding alone does to a run."""

    def __init__(self, batch_tokens: int, number: int) -> None:
        super().__init__(batch_tokens)
        self.number = number

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        order = torch.randperm(self.batch_tokens, generator=torch.Generator().manual_seed(self.number))
        return Batch(*(None if part is None else part[order] for part in batch[:3]))


@dataclass
class Case:
    """A short training, in float64 unless `float32`."""

    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)
    tied: bool = False  # start from a dictionary in which every third feature equals the one before it
    steps: int = 30
    batch_tokens: int = 16
    d_sae: int = 27
    float32: bool = False
    permuted: int = 0  # the number of an order of each batch's rows; 0 leaves them

    def dictionary(self, rows: PlantedRows) -> SAE:
        recipe = recipe_named(self.recipe)
        sae = SAE(rows.d_in, self.d_sae, activation=recipe.activation, k=self.settings["k"])
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            directions = torch.nn.functional.normalize(torch.randn(self.d_sae, rows.d_in, generator=generator), dim=-1)
            directions[2::3] = directions[1::3]
            sae.W_dec.copy_(directions)
            sae.W_enc.copy_(directions.T)
        return sae


def train_on(mesh_shape: tuple[int, int], case: Case) -> dict[str, Any]:
    """The curve of a case, and its final state put together from all shards."""
    torch.set_default_dtype(torch.float32 if case.float32 else torch.float64)
    mesh, b = Mesh(*mesh_shape), case.batch_tokens
    rows = PermutedRows(b, case.permuted) if case.permuted else PlantedRows(b)
    tokens = case.steps * case.batch_tokens
    given = {"d_sae": case.d_sae, "batch_tokens": case.batch_tokens, "tokens": tokens, "matmul": "highest"}
    recipe, config = resolve(case.recipe, **given, **case.settings)
    source = case.dictionary(rows) if case.tied and mesh.is_first else None
    state = start(rows, config, recipe, StableKernels(), source=source, mesh=mesh)  # type: ignore[arg-type]
    own, curve, dead, placed = OwnRows(rows, mesh.rank, mesh.world), [], 0, 0  # type: ignore[var-annotated]
    for step in range(case.steps):
        metrics = train_step(state, own.batch(step), config)
        curve.append([mesh.average(metrics[name]).item() for name in ("loss", "error")] + [metrics["l0"].item()])
        dead += int(mesh.reduce(state.dead(config.dead_after_tokens).sum(), "sum", "features"))
        if recipe.resample and state.step in config.resample_steps:
            placed += len(resample_dead(state, rows, config, recipe))
    tensors = {name: whole(state, name, tensor) for name, tensor in all_tensors(state).items()}
    return {"curve": curve, "dead": dead, "placed": placed, "λ": state.penalty.value, **tensors}


def train_all_on(mesh_shape: tuple[int, int], cases: list[Case]) -> list[dict[str, Any]]:
    return [train_on(mesh_shape, case) for case in cases]


def bytes_of_a_step(mesh_shape: tuple[int, int], case: Case) -> dict[str, int]:
    """What one training step exchanges, without what a start does."""
    torch.set_default_dtype(torch.float64)
    mesh, rows = Mesh(*mesh_shape), PlantedRows(case.batch_tokens)
    given = {"d_sae": case.d_sae, "batch_tokens": case.batch_tokens, "tokens": 16 * case.batch_tokens}
    recipe, config = resolve(case.recipe, matmul="highest", **given, **case.settings)
    state = start(rows, config, recipe, StableKernels(), mesh=mesh)  # type: ignore[arg-type]
    mesh.received_bytes.clear()
    train_step(state, OwnRows(rows, mesh.rank, mesh.world).batch(0), config)  # type: ignore[arg-type]
    return dict(mesh.received_bytes)


class DeafMesh(Mesh):
    """A mesh that agrees on nothing: what other ranks send is noise here, perhaps not finite."""

    def agree(self, flag: bool | Tensor) -> bool:
        super().agree(flag)
        return False

    def stack(self, x: Tensor, axis: Axis) -> Tensor:
        """As if every rank sent the same as this one: no row then needs a second round of candidates."""
        return super().stack(x, axis).copy_(x.expand(self.size(axis), *x.shape))


def exchanged_on_fake_ranks(mesh_shape: tuple[int, int], d_sae: int) -> tuple[dict[str, int], dict[str, int]]:
    """Calls and bytes of a step on rank 0 of so many ranks that are not there: exchanges return at once, with noise."""
    world = mesh_shape[0] * mesh_shape[1]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    torch.set_default_dtype(torch.float32)
    mesh, rows = DeafMesh(*mesh_shape), PlantedRows(8)
    given = {"d_sae": d_sae, "batch_tokens": 8 * world, "tokens": 128 * world, "k": 4, "matmul": "highest"}
    recipe, config = resolve("topk", aux_coefficient=0.0, resample_shares=(), **given)
    state = start(rows, config, recipe, reference, mesh=mesh)  # type: ignore[arg-type]
    mesh.received_bytes.clear()
    mesh.calls.clear()
    train_step(state, rows.batch(0), config)
    dist.destroy_process_group()
    return dict(mesh.calls), dict(mesh.received_bytes)


def all_tensors(state: TrainState) -> dict[str, Tensor]:
    moments = state.optimizer.tensors()
    return {**state.sae.tensors(), **moments, "tokens_since_fired": state.tokens_since_fired}


def whole(state: TrainState, name: str, tensor: Tensor) -> Any:
    """A tensor of all shards, one row per feature."""
    parameter = name.split(".")[1] if name.startswith("adam.") else name
    if parameter in WHOLE:
        return tensor.numpy().copy()
    rows, mesh = tensor.t() if parameter == "W_enc" else tensor, state.mesh
    padded = rows.new_zeros((len(mesh.features(27, 0)), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = mesh.stack(padded, "features")
    return torch.cat([part[: len(mesh.features(27, i))] for i, part in enumerate(parts)]).numpy().copy()


# --- whole runs ------------------------------------------------------------------------------------------------------


def run_on(mesh_shape: tuple[int, int], out: str, recipe: str, settings: dict[str, Any], stop_at: int = 0) -> int:
    """`sae.training.loop.train` in float32; with `stop_at` it is interrupted after that step. Returns the last step."""
    mesh = Mesh(*mesh_shape)
    rows = StoppingRows(16, stop_at)
    _, config = resolve(recipe, **{"d_sae": 27, "batch_tokens": 16, "tokens": 40 * 16, "matmul": "highest", **settings})
    try:
        loop.train(OwnRows(rows, mesh.rank, mesh.world), out, config, kernels="reference", mesh=mesh)
    except Interrupted:
        assert stop_at
    return saved_header(Path(out))["step"]  # type: ignore[no-any-return]


class StoppingRows(PlantedRows):
    """Rows of which one batch comes with a signal to stop, to rank 1 or the only one."""

    def __init__(self, batch_tokens: int, stop_at: int) -> None:
        super().__init__(batch_tokens)
        self.stop_at = stop_at

    def batch(self, step: int) -> Batch:
        if self.stop_at and step == self.stop_at and (not dist.is_initialized() or dist.get_rank() == 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step)
