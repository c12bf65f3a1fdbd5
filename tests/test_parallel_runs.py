"""Whole runs on many ranks: stopped, killed and continued, started by torchrun, and started wrongly."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from kill_series import series_of_moments
from ranks import on_ranks, run_on, several

from sae import pipeline
from sae.cli import build_parser, main
from sae.dictionary.files import load
from sae.jobs.checkpoint import CheckpointError
from sae.parallel import said_once
from sae.parallel.decisions import refuse_different_settings
from sae.parallel.launch import all_ranks, joined_ranks
from sae.parallel.mesh import ONE, Mesh
from sae.training.state_files import read_state, saved_header

# --- whole runs ------------------------------------------------------------------------------------------------------

TOPK = ("topk", {"k": 3, "dead_tokens": 16})


@pytest.fixture(scope="module")
def unbroken_and_cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on 1x2, of which one was interrupted by a signal to one rank: both stopped, after one save."""
    unbroken, cut = (tmp_path_factory.mktemp(name) / "run" for name in ("unbroken", "cut"))
    runs = [(run_on, (1, 2), str(unbroken), *TOPK), (run_on, (1, 2), str(cut), *TOPK, 21)]
    ended = on_ranks(2, several, *runs)
    assert ended in ([[40, steps]] * 2 for steps in range(15, 23))  # the same step on both
    assert not (cut / "state.safetensors").exists()
    return unbroken, cut


def test_a_run_continues_on_its_mesh_bit_for_bit_and_on_any_other_closely(
    unbroken_and_cut: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also where a save of a later state was killed halfway: the one before counts, and the leftovers go."""
    for name in ("cut", "one", "rows"):
        shutil.copytree(unbroken_and_cut[1], tmp_path / name)
    step = saved_header(tmp_path / "cut")["step"]
    leftover = tmp_path / "cut" / "state" / "000000099" / "features-0000000000.safetensors"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half a file")
    assert saved_header(tmp_path / "cut")["step"] == step
    runs = [(run_on, shape, str(tmp_path / name), *TOPK) for name, shape in (("cut", (1, 2)), ("rows", (2, 1)))]
    assert on_ranks(2, several, *runs) == [[40, 40]] * 2
    assert on_ranks(1, run_on, (1, 1), str(tmp_path / "one"), *TOPK) == [40]
    assert [path.name for path in (tmp_path / "cut" / "state").iterdir()] == ["000000040"]
    assert not (tmp_path / "one" / "state.json").exists()
    assert not (tmp_path / "one" / "state").exists()
    unbroken = load(unbroken_and_cut[0]).tensors()
    for name, tensor in load(tmp_path / "cut").tensors().items():
        assert torch.equal(tensor, unbroken[name]), name
    written = (unbroken_and_cut[0] / "sae.safetensors").read_bytes()
    assert (tmp_path / "cut/sae.safetensors").read_bytes() == written
    for name in ("one", "rows"):
        for tensor, expected in zip(load(tmp_path / name).tensors().values(), unbroken.values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert steps == [25, 40]


def test_a_run_killed_twenty_times_continues_bit_for_bit(tmp_path: Path, rng: Any) -> None:
    """SIGKILL to one rank or to all, half of them inside a save; `scripts/check_ranks.py` kills a hundred times."""
    found = series_of_moments(tmp_path, 20, rng, steps=60)
    assert (found["kills"], found["inside_a_save"]) == (20, 10)
    assert found["with_leftovers"] > 0
    assert found["same_mesh_differs"] == []
    assert found["other_mesh"] < 1e-12


def test_a_damaged_part_of_a_state_is_named(unbroken_and_cut: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(unbroken_and_cut[1], tmp_path, dirs_exist_ok=True)
    (part,) = tmp_path.glob("state/*/features-0000000014.safetensors")
    part.write_bytes(part.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match=r"features-0000000014.safetensors is damaged"):
        read_state(tmp_path, ONE, 27)


# --- wrong settings --------------------------------------------------------------------------------------------------


def different_settings() -> str:
    mesh = Mesh(1, 2)
    try:
        refuse_different_settings(mesh, {"lr": 0.1 * (1 + mesh.rank), "k": 3})
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def told(rank: int, port: int, *arguments: str) -> tuple[int, str]:
    """The exit status of `sae`, started by torchrun as this rank of two, and what it prints to stderr."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (
        patch.dict(os.environ, {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}),
        patch.object(said_once, "WAIT_S", 2.0),
        redirect_stderr(io.StringIO()) as said,
    ):
        try:
            status = main(arguments)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    return status, said.getvalue()


def wrongly_started(port: int) -> list[tuple[int, str]]:
    """Of this rank: a wrong setting and a wrong flag on both, then an error of rank 1 alone."""
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    train = ["train", "--out", "out", "--shard", "features"]
    both = [told(rank, port, *train, "--acts", "nowhere"), told(rank, port, *train, "--no-such-flag")]
    return [*both, *([told(rank, port, *train, "--acts", "on rank 1 missing")] if rank else [])]


def joined_twice(port: int) -> list[Any]:
    """What the ranks tell each other in two groups, one after the other, as a script has that trains and evaluates."""
    variables = {"RANK": str(dist.get_rank()), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.barrier()
    dist.destroy_process_group()
    found = []
    with patch.dict(os.environ, {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}):
        for how in (joined_ranks("features", "cpu", d_in=2, d_sae=4, batch_tokens=2, k=1), all_ranks("cpu")):
            with how as mesh:
                found.append(mesh.everyones(10 * mesh.rank))
    return found


def test_a_script_joins_its_ranks_more_than_once() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert on_ranks(2, joined_twice, store.port) == [[[0, 10], [0, 10]]] * 2


def test_a_wrong_start_is_said_by_one_rank() -> None:
    """torchrun's store is there, kept by this process; an error of one rank alone is said by that rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings, wrong = zip(*on_ranks(2, several, (different_settings,), (wrongly_started, store.port)), strict=True)
    assert settings[0].startswith("ValueError: ")
    assert "lr is 0.1 on rank 0 and 0.2 on rank 1" in settings[0]
    assert settings[1].startswith("FailedElsewhere")
    (first, usage), (second, second_usage, alone) = wrong
    assert first[0] == 2
    assert "nowhere" in first[1]
    assert first[1].count("sae train: ") == 1
    assert second == (2, "")
    assert usage[0] == second_usage[0] == 2
    assert "--no-such-flag" in usage[1]
    assert second_usage[1] == ""
    assert alone[0] == 2
    assert alone[1].startswith("sae train: rank 1: ")


# --- under torchrun --------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def test_a_rank_that_fails_under_torchrun_is_named(tmp_path: Path) -> None:
    """One real start: rank 1 raises in a step; one message says who, where, when, what is kept and what to do."""
    store = tmp_path / "acts.zarr"
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(4096, 8)).astype(np.float32))
    pipeline.store_activations(tmp_path / "rows.npy", store)
    train = ["train", "--acts", str(store), "--out", str(tmp_path / "sae"), "--recipe", "topk", "--l0", "4"]
    sizes = ["--d-sae", "64", "--batch-tokens", "32", "--tokens", "6400", "--shard", "features", "--device", "cpu"]
    fault = [str(ROOT / "scripts/faulty_rank.py"), "exception", str(tmp_path / "mark")]
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", *fault, *train, *sizes]
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if "sae train: " in line]
    assert len(said) == 1, ended.stderr
    assert re.search(
        r"rank 1 \(\S+, process \d+\) failed in step 4\d: something that nobody foresaw\. Nothing was saved yet\. "
        r"Repeat the command, on as many ranks or on others\.",
        said[0],
    )


def test_the_examples_can_be_read() -> None:
    """Shell files parse, the job has the fields of an indexed job, and every flag of `sae` in them exists."""
    examples = sorted((ROOT / "docs/examples").iterdir())
    assert {path.suffix for path in examples} == {".sh", ".sbatch", ".py", ".yaml", ".jsonl"}
    for path in examples:
        text = path.read_text()
        if path.suffix in (".sh", ".sbatch"):
            subprocess.run(["bash", "-n", str(path)], check=True)
        elif path.suffix == ".py":
            compile(text, str(path), "exec")
        elif path.suffix == ".jsonl":
            assert [json.loads(line) for line in text.splitlines()]
        for verb in ("harvest", "train"):
            known = next(a for a in build_parser()._actions if a.dest == "verb").choices[verb]._option_string_actions  # type: ignore[index, union-attr]
            for command in re.findall(rf"(?:sae|sae\.cli) {verb} ([^\n&]*(?:\\\n[^\n&]*)*)", text):
                assert set(re.findall(r"--[a-z-]+", command)) <= set(known), (path.name, command)
    job = yaml.safe_load((ROOT / "docs/examples/harvest-job.yaml").read_text())
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert f"--world {job['spec']['completions']}" in container["args"][0]
