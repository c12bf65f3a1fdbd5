"""The `sae` command, killed at random moments and repeated, ends with the bytes of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Commands

from sae import pipeline
from sae.jobs.checkpoint import CheckpointError, read_tensors
from sae.jobs.directory import cut_log
from sae.lm import NativeModel
from sae.training.recipes import RECIPES as ALL

RECIPES = {
    # l1 and the learning rate are high so that features die and every resampling event has work
    "towards-monosemanticity": ["--set", "l1=60", "--set", "lr=0.01"],
    "topk": ["--l0", "4", "--set", "lr=0.02"],
}
OTHERS = [recipe for recipe in ALL if recipe not in RECIPES]
PLACES = ("blocks.0.mlp.hook_in", "blocks.0.hook_resid_mid", "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out")
HARVEST_TOKENS, HELDOUT_TOKENS = 12_288, 512
TRAIN_STEPS, BATCH = 600, 256


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("log") / "sae.log")


@pytest.fixture(scope="module")
def harvest(tiny_model_dir: Path, tiny_text: Path) -> list[object]:
    return [
        "harvest",
        "--model",
        tiny_model_dir,
        "--text",
        tiny_text,
        "--tokens",
        HARVEST_TOKENS,
        "--heldout-tokens",
        HELDOUT_TOKENS,
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def store(commands: Commands, harvest: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken harvest."""
    out = tmp_path_factory.mktemp("unbroken") / "acts.zarr"
    assert commands.run(*harvest, "--out", out) == 0
    return out


def training(store: Path, recipe: str, out: Path) -> list[object]:
    return [
        "train",
        "--acts",
        store,
        "--out",
        out,
        "--recipe",
        recipe,
        "--d-sae",
        96,
        "--tokens",
        TRAIN_STEPS * BATCH,
        "--batch-tokens",
        BATCH,
        "--seed",
        1,
        *RECIPES[recipe],
    ]


@pytest.fixture(scope="module", params=list(RECIPES))
def unbroken(
    request: pytest.FixtureRequest, commands: Commands, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A recipe and its training without interruption."""
    out = tmp_path_factory.mktemp("unbroken") / "sae"
    assert commands.run(*training(store, request.param, out)) == 0
    return request.param, out


def store_bytes(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def n_markers(store: Path) -> int:
    return sum(1 for _ in store.glob("markers/*/*.json"))


def logged_steps(out: Path) -> list[int]:
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def saved_step(out: Path) -> int:
    try:
        return read_tensors(out / "state.safetensors")[1]["step"]
    except CheckpointError:  # not written yet, or replaced by the next one while it was being opened
        return 0


def assert_same_dictionary(out: Path, unbroken: Path) -> None:
    assert (out / "sae.safetensors").read_bytes() == (unbroken / "sae.safetensors").read_bytes()
    assert (out / "state.safetensors").read_bytes() == (unbroken / "state.safetensors").read_bytes()
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("rows_per_s", "stall_share")}
            for line in log.read_text().splitlines()
        ]
        for log in (out / "metrics.jsonl", unbroken / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


def test_harvest_killed_three_times_writes_the_same_bytes(
    commands: Commands, harvest: list[object], store: Path, tmp_path: Path, rng: random.Random
) -> None:
    """Each kill comes a random number of shards after the start, at a random moment of the next shard."""
    out = tmp_path / "acts.zarr"
    for _ in range(3):
        there = n_markers(out)
        wanted = there + rng.randrange(1, 80)
        status = commands.stop(
            signal.SIGKILL, lambda n=wanted: n_markers(out) >= n, *harvest, "--out", out, after_s=rng.random() * 0.004
        )
        assert status == -signal.SIGKILL
        assert not (out / "complete.json").exists()
    assert commands.run(*harvest, "--out", out) == 0
    assert store_bytes(out) == store_bytes(store)


def test_training_killed_three_times_ends_in_the_same_bytes(
    commands: Commands, store: Path, unbroken: tuple[str, Path], tmp_path: Path, rng: random.Random
) -> None:
    """Once before the first checkpoint, twice after one; then it saves at every step, so that kills hit saving too."""
    recipe, whole = unbroken
    out = tmp_path / "sae"
    command = training(store, recipe, out)
    first = commands.stop(signal.SIGKILL, lambda: bool(logged_steps(out)), *command, after_s=rng.random() * 0.02)
    assert first == -signal.SIGKILL
    assert saved_step(out) == 0
    for earliest, latest in ((30, 130), (200, 400)):  # resampling events come after steps 60, 120, 180 and 240
        wanted = rng.randrange(earliest, latest)
        reached: Callable[[], bool] = lambda n=wanted: saved_step(out) >= n  # noqa: E731
        status = commands.stop(signal.SIGKILL, reached, *command, save_minutes=0, after_s=rng.random() * 0.004)
        assert status == -signal.SIGKILL
        assert wanted <= saved_step(out) < TRAIN_STEPS
        assert not (out / "sae.safetensors").exists()
    assert commands.run(*command) == 0
    assert_same_dictionary(out, whole)


@pytest.fixture(scope="module")
def places(tiny_model: NativeModel, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with what every recipe reads."""
    out = tmp_path_factory.mktemp("places") / "acts.zarr"
    return pipeline.harvest(tiny_model, tiny_text, out, tokens=4096, heldout_tokens=256, hook_points=PLACES)


@pytest.mark.parametrize("recipe", OTHERS)
def test_every_other_recipe_killed_twice_ends_in_the_same_bytes(
    commands: Commands, places: Path, tmp_path: Path, recipe: str, rng: random.Random
) -> None:
    """Killed while it saves at every step: before and after its first resampling, or anywhere else."""
    hooks = {"transcoder": PLACES[::3], "crosscoder": PLACES[1:3]}.get(recipe, PLACES[2:3])
    small = ["--d-sae", 48, "--tokens", 200 * 64, "--batch-tokens", 64, "--set", "lr=0.01"]
    command = ["train", "--acts", places, "--recipe", recipe, *small, *(f"--hook-point={hook}" for hook in hooks)]
    assert commands.run(*command, "--out", tmp_path / "whole") == 0
    out = tmp_path / "sae"
    for earliest, latest in ((3, 15), (40, 150)):
        wanted = rng.randrange(earliest, latest)
        reached: Callable[[], bool] = lambda n=wanted: saved_step(out) >= n  # noqa: E731
        status = commands.stop(
            signal.SIGKILL, reached, *command, "--out", out, save_minutes=0, after_s=rng.random() * 0.004
        )
        assert status == -signal.SIGKILL
        assert not (out / "sae.safetensors").exists()
    assert commands.run(*command, "--out", out) == 0
    assert_same_dictionary(out, tmp_path / "whole")


def test_resampling_had_work_in_the_runs_compared(unbroken: tuple[str, Path]) -> None:
    recipe, whole = unbroken
    events = read_tensors(whole / "state.safetensors")[1]["resampled"]
    steps = {"towards-monosemanticity": {60, 120, 180, 240}, "topk": {240, 330, 420, 480, 540}}[recipe]
    assert len(events) >= 2
    assert {event["step"] for event in events} <= steps
    assert all(event["features"] > 0 for event in events)


def test_a_log_cut_to_its_checkpoint_is_cut_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (25, 50, 75)) + '{"step": 100, "lo')
    before = log.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)  # before the rename
        with pytest.raises(KeyboardInterrupt):
            cut_log(log, 50)
    assert log.read_text() == before
    cut_log(log, 50)
    assert logged_steps(tmp_path) == [25, 50]
    assert log.read_text().endswith("}\n")


# --- SIGTERM and SIGINT ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_harvest_asked_to_stop_says_how_to_continue(
    commands: Commands, harvest: list[object], store: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "acts.zarr"
    before = commands.log.stat().st_size
    status = commands.stop(number, lambda: n_markers(out) >= 20, *harvest, "--out", out)
    assert status == 130
    said = commands.log.read_bytes()[before:].decode()
    assert f"every finished shard saved in {out}. Repeat the command to continue." in said
    assert "Traceback" not in said
    assert commands.run(*harvest, "--out", out) == 0
    assert store_bytes(out) == store_bytes(store)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])  # Slurm: TERM, or --signal=USR1
def test_training_asked_to_stop_saves_and_says_how_to_continue(
    commands: Commands, store: Path, unbroken: tuple[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    recipe, whole = unbroken
    out = tmp_path / "sae"
    command = training(store, recipe, out)
    before = commands.log.stat().st_size
    assert commands.stop(number, lambda: len(logged_steps(out)) >= 3, *command) == 130
    step = saved_step(out)
    assert 75 <= step < TRAIN_STEPS
    said = commands.log.read_bytes()[before:].decode()
    assert f"stopped at step {step:,} of {TRAIN_STEPS:,}, saved in {out}. Repeat the command to continue." in said
    assert "Traceback" not in said
    assert commands.run(*command) == 0
    assert_same_dictionary(out, whole)


def test_the_command_itself_in_a_fresh_process_is_interrupted_the_same_way(
    tiny_model_dir: Path, tiny_model: NativeModel, tiny_text: Path, tmp_path: Path
) -> None:
    """As in a shell: `sae harvest …`, Ctrl-C, and the same command again; not one of our forks."""
    whole = pipeline.harvest(tiny_model, tiny_text, tmp_path / "whole.zarr", tokens=2048, heldout_tokens=64)
    out = tmp_path / "acts.zarr"
    command = [
        sys.executable,
        "-m",
        "sae.cli",
        "harvest",
        "--model",
        str(tiny_model_dir),
        "--text",
        str(tiny_text),
        "--tokens",
        "2048",
        "--heldout-tokens",
        "64",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while n_markers(out) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "Repeat the command to continue." in said
    assert "Traceback" not in said
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == str(out)
    assert store_bytes(out) == store_bytes(whole)
