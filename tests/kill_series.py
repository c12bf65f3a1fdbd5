"""A run on two shards that is killed at random moments, also inside a save, and continued each time."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from ranks import PlantedRows, on_ranks, started

from sae.parallel.mesh import ONE, Mesh
from sae.training import loop
from sae.training.recipes import resolve
from sae.training.rows import OwnRows
from sae.training.state_files import INDEX, PARTS, read_state, saved_header

D_SAE = 27
MESH = (1, 2)


def run(mesh_shape: tuple[int, int], out: str, steps: int) -> int:
    """A short run in float64 that saves at every step; returns its last step."""
    torch.set_default_dtype(torch.float64)
    mesh, rows = Mesh(*mesh_shape), PlantedRows(16)
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
