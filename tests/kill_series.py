"""A run on two shards that is killed at random moments, also inside a save, and continued each time.

`series` waits a random time before each kill. `series_of_moments` says at which file operation of a save, or at which
batch, a rank kills itself: no time is lost, so that twenty kills take seconds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import TIMEOUT_S, PlantedRows, on_ranks, started

from sae.parallel.mesh import ONE, Mesh
from sae.training import loop
from sae.training.recipes import resolve
from sae.training.rows import Batch, OwnRows
from sae.training.state_files import INDEX, PARTS, read_state, saved_header

D_SAE = 27
MESH = (1, 2)


FILE_OPERATIONS = 10  # of a save on rank 0, about: each file is flushed, renamed, and its directory flushed


@dataclass(frozen=True)
class Death:
    """When a rank kills itself: as it reads the rows of a step, or before the n-th file operation from then on."""

    rank: int
    step: int
    operation: int  # 0: none


class DyingRows(PlantedRows):
    """Rows whose reading arms or carries out a death."""

    def __init__(self, batch_tokens: int, death: Death) -> None:
        super().__init__(batch_tokens)
        self.death, self.left = death, 0
        self._fsync, self._replace = os.fsync, os.replace

    def batch(self, step: int) -> Batch:
        if step == self.death.step:
            self.left = self.death.operation
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            os.fsync, os.replace = self._counted(self._fsync), self._counted(self._replace)
        return super().batch(step)

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments)

        return counted


def run(mesh_shape: tuple[int, int], out: str, steps: int, death: Death | None = None) -> int:
    """A short run in float64 that saves at every step; returns its last step."""
    torch.set_default_dtype(torch.float64)
    mesh = Mesh(*mesh_shape)
    rows = DyingRows(16, death) if death and death.rank == mesh.rank else PlantedRows(16)
    given = {"d_sae": D_SAE, "batch_tokens": 16, "tokens": steps * 16, "matmul": "highest", "k": 3, "dead_tokens": 16}
    _, config = resolve("topk", **given)
    own = OwnRows(rows, mesh.rank, mesh.world)  # type: ignore[arg-type]
    loop.train(own, out, config, kernels="reference", mesh=mesh, save_minutes=0)
    return int(saved_header(Path(out))["step"])


def state_of(out: Path) -> dict[str, torch.Tensor]:
    found = read_state(out, ONE, D_SAE)
    assert found is not None
    return found[0]


def deviation(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any tensor, as a share of its largest value."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - t.double()).abs().max() / t.double().abs().max().clamp_min(1e-30))
        for name, t in expected.items()
    )


def series(directory: Path, kills: int, rng: random.Random, steps: int = 60) -> dict[str, Any]:
    """Kills runs of `steps` steps `kills` times, and lets each end; what differed from the run that nobody killed.

    `inside_a_save`: kills that left files of a state that does not count. `same_mesh_differs`: results that are not the
    same bit for bit. `other_mesh`: the largest deviation of a run that was continued on 1x1 or 2x1 instead.
    """
    began = time.monotonic()
    on_ranks(2, run, MESH, str(directory / "unbroken"), steps)
    longest_s = time.monotonic() - began
    expected = state_of(directory / "unbroken")
    found: dict[str, Any] = {"kills": 0, "inside_a_save": 0, "runs": 0, "same_mesh_differs": 0, "other_mesh": 0.0}
    while found["kills"] < kills:
        out = directory / f"run{found['runs']}"
        while not _ends(out, steps, rng.uniform(0.2, 0.9) * longest_s, rng.random() < 0.5):
            found["kills"] += 1
            found["inside_a_save"] += _has_leftovers(out)
            if found["kills"] % 10 == 3 and saved_header(out):
                shutil.copytree(out, directory / "other")
                shape = rng.choice([(1, 1), (2, 1)])
                on_ranks(shape[0] * shape[1], run, shape, str(directory / "other"), steps)
                found["other_mesh"] = max(found["other_mesh"], deviation(state_of(directory / "other"), expected))
                shutil.rmtree(directory / "other")
            if found["kills"] == kills:
                on_ranks(2, run, MESH, str(out), steps)
                break
        found["runs"] += 1
        found["same_mesh_differs"] += any(not torch.equal(t, expected[name]) for name, t in state_of(out).items())
        shutil.rmtree(out)
    return found


def series_of_moments(directory: Path, kills: int, rng: random.Random, steps: int) -> dict[str, Any]:
    """`series`, with every second kill inside a save; `steps` are more than the kills take together.

    Rank 0 or 1 is killed, and in half of the cases the other with it. Besides, one killed run continues on 1x1 or 2x1.
    """
    on_ranks(2, run, MESH, str(directory / "unbroken"), steps)
    expected, out = state_of(directory / "unbroken"), directory / "run"
    found: dict[str, Any] = {"kills": 0, "inside_a_save": 0, "with_leftovers": 0}
    for number in range(kills):
        step = saved_header(out).get("step", 0) + rng.randint(0, 2)
        death = Death(rng.randrange(2), step, rng.randint(1, FILE_OPERATIONS) if number % 2 else 0)
        assert _dies(out, steps, death, rng.random() < 0.5), (number, death)
        found["kills"] += 1
        found["inside_a_save"] += bool(death.operation)
        found["with_leftovers"] += _has_leftovers(out)
        if number == kills // 2:
            shutil.copytree(out, directory / "other")
    shape = rng.choice([(1, 1), (2, 1)])
    on_ranks(shape[0] * shape[1], run, shape, str(directory / "other"), steps)
    on_ranks(2, run, MESH, str(out), steps)
    differing = [name for name, tensor in state_of(out).items() if not torch.equal(tensor, expected[name])]
    return {**found, "same_mesh_differs": differing, "other_mesh": deviation(state_of(directory / "other"), expected)}


def _dies(out: Path, steps: int, death: Death, kill_all: bool) -> bool:
    """Whether a run reaches this moment; then one rank is killed, or all are."""
    with started(2, run, MESH, str(out), steps, death) as (processes, _):
        processes[death.rank].join(TIMEOUT_S)
        for process in processes:
            if kill_all:
                process.kill()
            process.join(TIMEOUT_S)
        return bool(processes[death.rank].exitcode == -signal.SIGKILL)


def _ends(out: Path, steps: int, seconds: float, kill_all: bool) -> bool:
    """Whether a run ends within these seconds; else all its ranks are killed, or one and the others notice."""
    with started(2, run, MESH, str(out), steps) as (processes, _):
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        ended = all(process.exitcode == 0 for process in processes)
        if not ended:
            for process in processes if kill_all else processes[1:]:
                process.kill()
        for process in processes:
            process.join()
    return ended


def _has_leftovers(out: Path) -> bool:
    """Whether there are files of a state that state.json does not name."""
    step = saved_header(out).get("step", -1)
    homes = [home.name for home in (out / PARTS).iterdir()] if (out / PARTS).exists() else []
    return any(home != f"{step:09d}" or not (out / PARTS / home / INDEX).exists() for home in homes)
