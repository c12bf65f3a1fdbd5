"""Several workers write the same bytes as one; budgets and rings stop in time; a full disk loses nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from commands import Commands
from fakes import HOOK_POINT, made_up_documents, text_source

from sae import pipeline
from sae.cli import main
from sae.cli.flags import size
from sae.harvesting import harvest as harvesting
from sae.harvesting.lanes import lanes_of
from sae.lm import NativeModel
from sae.pipeline import PipelineError
from store.activations import ActivationStore
from store.common import HELD_OUT, LANES, TRAIN, DiskFull, StoreError
from store.places import LocalPlace

BUDGET = {"tokens": 8192, "heldout_tokens": 1024}  # what tiny_store holds


def contents(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("log") / "sae.log")


def harvest_command(model: Path, text: Path, out: Path) -> list[object]:
    return [
        "harvest",
        "--model",
        model,
        "--text",
        text,
        "--tokens",
        8192,
        "--heldout-tokens",
        1024,
        "--device",
        "cpu",
        "--out",
        out,
    ]


# --- workers ---------------------------------------------------------------------------------------------------------


def test_lanes_are_dealt_out_whole() -> None:
    for world in (1, 2, 3, 64):
        dealt = [lane for rank in range(world) for lane in lanes_of(rank, world)]
        assert sorted(dealt) == list(range(LANES))
    for rank, world in ((-1, 2), (2, 2), (0, 65), (0, 0)):
        with pytest.raises(ValueError, match="rank"):
            lanes_of(rank, world)


def test_three_workers_one_after_another_write_the_bytes_of_one(
    tmp_path: Path, tiny_store: Path, tiny_model: NativeModel, tiny_text: Path
) -> None:
    out = tmp_path / "acts.zarr"
    for rank in (2, 0, 1):
        assert not out.exists() or not ActivationStore.open(out).is_complete
        pipeline.harvest(tiny_model, tiny_text, out, rank=rank, world=3, **BUDGET)
    assert contents(out) == contents(tiny_store)
    assert [p.name for p in tmp_path.iterdir()] == ["acts.zarr"]  # no locks left


def test_two_workers_at_once_one_killed_and_its_lanes_taken_up(
    commands: Commands, tmp_path: Path, tiny_store: Path, tiny_model_dir: Path, tiny_text: Path
) -> None:
    out = tmp_path / "acts.zarr"
    command = harvest_command(tiny_model_dir, tiny_text, out)
    first = commands.start(*command, "--rank", 0, "--world", 2)
    killed = commands.stop(
        signal.SIGKILL,
        lambda: sum(int(p.stem) % 2 for p in out.glob("markers/*/*.json")) >= 5,
        *command,
        "--rank",
        1,
        "--world",
        2,
    )
    assert killed == -signal.SIGKILL
    first.join(300)
    assert first.exitcode == 0
    assert not ActivationStore.open(out).is_complete
    assert commands.run(*command) == 0  # one worker, all lanes
    assert contents(out) == contents(tiny_store)


def test_a_second_writer_on_a_held_lane_is_refused_by_name(
    tmp_path: Path, tiny_model: NativeModel, tiny_text: Path
) -> None:
    out = tmp_path / "acts.zarr"
    pipeline.harvest(tiny_model, tiny_text, out, rank=0, world=2, **BUDGET)
    with ActivationStore.open(out).hold([1, 5]):
        with pytest.raises(StoreError, match=rf"lane 1\) is being written by pid {os.getpid()} on "):
            pipeline.harvest(tiny_model, tiny_text, out, rank=1, world=2, **BUDGET)
        with pytest.raises(StoreError, match=r"lane 5\)"):
            pipeline.harvest(tiny_model, tiny_text, out, rank=5, world=64, **BUDGET)
        pipeline.harvest(tiny_model, tiny_text, out, rank=3, world=64, **BUDGET)  # a free lane


def test_workers_sweep_their_own_lanes_only(tmp_path: Path, tiny_store: Path) -> None:
    store = ActivationStore.open(shutil.copytree(tiny_store, tmp_path / "acts.zarr"))
    strays = [store.path / "tokens" / "c" / str(32 + lane) / "0.ab.partial" for lane in (0, 1)]
    for stray in strays:
        stray.write_bytes(b"half")
    with store.hold([0, 2]):
        assert [stray.exists() for stray in strays] == [False, True]
    with store.hold():
        assert not strays[1].exists()


def test_workers_n_starts_them_and_waits(
    tmp_path: Path,
    tiny_store: Path,
    tiny_model_dir: Path,
    tiny_text: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "acts.zarr"
    command = [str(a) for a in harvest_command(tiny_model_dir, tiny_text, out)]
    assert main([*command, "--workers", "2"]) == 0
    assert contents(out) == contents(tiny_store)
    assert main([*command, "--workers", "65"]) == 2
    assert "rank 0 of world 65" in capfd.readouterr().err


# --- budgets ---------------------------------------------------------------------------------------------------------


def disk_taken(path: Path) -> int:
    return int(subprocess.check_output(["du", "-s", "--block-size=1", str(path)]).split()[0])


def test_a_disk_budget_stops_with_a_usable_store_and_continues_when_raised(
    tmp_path: Path, tiny_store: Path, tiny_model_dir: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "acts.zarr"
    command = [str(a) for a in harvest_command(tiny_model_dir, tiny_text, out)]
    budget = 4_000_000
    assert main([*command, "--max-disk", "4MB"]) == 0
    said = capsys.readouterr().err
    assert "stopped at the disk budget" in said
    assert "Raise --max-disk and repeat the command" in said
    files = [p for p in out.rglob("*") if p.is_file()]
    assert sum(-(-p.stat().st_size // 4096) * 4096 for p in files) <= budget
    store = ActivationStore.open(out)
    assert not store.is_complete
    assert len(store.markers(HELD_OUT)) == 32
    written = list(store.markers(TRAIN))
    assert LANES <= len(written) < 256
    assert written == list(range(len(written)))  # the same whatever the number of workers
    for shard in written:
        store.read_acts(TRAIN, shard, HOOK_POINT)
    pipeline.train(out, tmp_path / "d", d_sae=40, tokens=512, config={"k": 4, "batch_tokens": 128})
    assert main(command) == 0
    assert contents(out) == contents(tiny_store)


def test_a_budget_too_small_for_anything_is_refused(tmp_path: Path, tiny_model: NativeModel, tiny_text: Path) -> None:
    with pytest.raises(PipelineError, match=r"one shard of each lane take [0-9.,]+ MB"):
        pipeline.harvest(tiny_model, tiny_text, tmp_path / "a.zarr", max_disk_bytes=100_000, **BUDGET)
    assert not (tmp_path / "a.zarr").exists()


def test_a_memory_budget_stops_with_a_usable_store_and_continues_when_raised(
    tmp_path: Path, tiny_store: Path, tiny_model: NativeModel, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, looks = tmp_path / "acts.zarr", [0]

    def growing() -> int:
        looks[0] += 1
        return 10**9 + looks[0] * 10**7

    with monkeypatch.context() as patch:
        patch.setattr(import_module("sae.pipeline.harvest"), "resident_bytes", lambda: 10**9)  # of the forecast
        patch.setattr(harvesting, "resident_bytes", growing)
        with pytest.raises(harvesting.OutOfMemoryBudget, match=r"more than the 1,400 MB.*--max-ram .*to continue"):
            pipeline.harvest(tiny_model, tiny_text, out, max_ram_bytes=14 * 10**8, **BUDGET)
    store = ActivationStore.open(out)
    assert len(store.markers(HELD_OUT)) + len(store.markers(TRAIN)) == looks[0] == 41
    assert [p.text for p in store.verify() if "shards are written" not in p.text] == []
    pipeline.train(out, tmp_path / "d", d_sae=40, tokens=512, config={"k": 4, "batch_tokens": 128})
    pipeline.harvest(tiny_model, tiny_text, out, max_ram_bytes=10**11, **BUDGET)
    assert contents(out) == contents(tiny_store)


def test_a_memory_budget_below_the_rows_in_hand_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model: NativeModel, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb = import_module("sae.pipeline.harvest")  # the package has a function of this name
    monkeypatch.setattr(verb, "resident_bytes", lambda: 3_000_000)
    budget = 3_000_000 + 4 * 32 * 32 * 4  # four shards of one context of 32 rows, 32 wide, float32
    out = tmp_path / "acts.zarr"
    with pytest.raises(PipelineError, match=r"more than the 3 MB allowed\. Raise --max-ram, or name fewer hook points"):
        pipeline.harvest(tiny_model, tiny_text, out, max_ram_bytes=budget - 1, **BUDGET)
    assert not out.exists()
    with pytest.raises(harvesting.OutOfMemoryBudget):
        pipeline.harvest(tiny_model, tiny_text, out, max_ram_bytes=budget, **BUDGET)  # this process holds more


def test_workers_share_the_memory_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Done:
        returncode = 0

        def __init__(self, command: list[str], **_: object) -> None:
            started.append(command)

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Done)
    out = str(tmp_path / "a.zarr")
    assert main(["harvest", "--text", "default", "--out", out, "--workers", "4", "--max-ram", "8GB"]) == 0
    assert [command[-4:] for command in started] == [["--max-ram", "2000000000", "--rank", str(r)] for r in range(4)]


@pytest.mark.parametrize(("text", "expected"), [("10", 10), ("2k", 2000), ("1.5MB", 1_500_000), ("3 GiB", 3 * 10**9)])
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["write_chunk", "write"])
def test_a_disk_that_fills_up_loses_no_shard_and_says_how_to_continue(
    call: str,
    tmp_path: Path,
    tiny_store: Path,
    tiny_model: NativeModel,
    tiny_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, real, left = tmp_path / "acts.zarr", getattr(LocalPlace, call), [40]

    def filling(self: LocalPlace, key: str, *rest: bytes, **how: bool) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, key, *rest, **how)

    with monkeypatch.context() as patch:
        patch.setattr(LocalPlace, call, filling)
        with pytest.raises(DiskFull, match=r"is full .* make room and repeat the command"):
            pipeline.harvest(tiny_model, tiny_text, out, **BUDGET)
    store = ActivationStore.open(out)
    written = {split: store.markers(split) for split in (HELD_OUT, TRAIN)}
    assert sum(map(len, written.values())) == (40 if call == "write" else 10)  # four files a shard
    named = {name for of_split in written.values() for marker in of_split.values() for name in marker.files}
    there = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.suffix != ".json"}
    assert there == named  # the room of the shard that failed was given back
    pipeline.harvest(tiny_model, tiny_text, out, **BUDGET)
    assert contents(out) == contents(tiny_store)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_small_disk_that_really_is_full(
    tmp_path: Path, tiny_store: Path, tiny_model: NativeModel, tiny_text: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount here")
    try:
        with pytest.raises(PipelineError, match="Lower --tokens"):
            pipeline.harvest(tiny_model, tiny_text, disk / "big.zarr", tokens=10**6, heldout_tokens=1024)
        out = disk / "acts.zarr"
        # the forecast counts bytes, a tmpfs counts pages, so it lets this one begin
        with pytest.raises(DiskFull):
            pipeline.harvest(tiny_model, tiny_text, out, **BUDGET)
        store = ActivationStore.open(out)
        problems = [p for p in store.verify() if "shards are written" not in p.text]
        assert problems == []
        assert len(store.markers(TRAIN)) > 20
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        pipeline.harvest(tiny_model, tiny_text, out, **BUDGET)
        assert contents(out) == contents(tiny_store)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- rings -----------------------------------------------------------------------------------------------------------


def test_a_ring_keeps_the_newest_rows_whatever_the_workers_and_interruptions(
    tmp_path: Path, tiny_store: Path, tiny_model: NativeModel, tiny_text: Path
) -> None:
    """The whole harvest has 4 training shards a lane; a ring of 2 a lane keeps the last two, byte for byte."""
    rings = [tmp_path / "one.zarr", tmp_path / "two.zarr"]
    ring = {"keep_rows": 2 * LANES * 32, **BUDGET}
    pipeline.harvest(tiny_model, tiny_text, rings[0], **ring)
    for rank in (1, 0):
        pipeline.harvest(tiny_model, tiny_text, rings[1], rank=rank, world=2, **ring)
    assert contents(rings[0]) == contents(rings[1])
    store, whole = ActivationStore.open(rings[0]), ActivationStore.open(tiny_store)
    assert store.is_complete
    assert store.verify() == []
    filled = [shard for shard, marker in store.markers(TRAIN).items() if marker.contexts]
    assert filled == list(range(128, 256))
    heldout = [shard for shard, marker in store.markers(HELD_OUT).items() if marker.contexts]
    assert len(list(rings[0].glob("tokens/c/*/0"))) == len(heldout) + 128
    for shard in (128, 200, 255):
        assert np.array_equal(store.read_stored(TRAIN, shard, HOOK_POINT), whole.read_stored(TRAIN, shard, HOOK_POINT))
    kept = {shard: marker.kept_rows for shard, marker in whole.markers(TRAIN).items()}
    assert store.totals(TRAIN, HOOK_POINT).kept_rows == sum(kept[shard] for shard in range(128, 256))
    pipeline.train(rings[0], tmp_path / "d", d_sae=40, tokens=512, config={"k": 4, "batch_tokens": 128})


def test_a_ring_killed_between_marker_and_files_is_swept_and_resumed(
    tmp_path: Path, tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = text_source(made_up_documents(1500))
    ring = {"keep_rows": LANES * 32, "tokens": 4096, "heldout_tokens": 64}
    whole = tmp_path / "whole.zarr"
    pipeline.harvest(tiny_model, source, whole, **ring)
    out = tmp_path / "acts.zarr"
    real, drops = ActivationStore._delete_files, [0]

    def dying(self: ActivationStore, split: str, shard: int) -> None:
        drops[0] += 1
        if drops[0] == 90:  # the call that empties a shard which fell out
            raise KeyboardInterrupt
        real(self, split, shard)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "_delete_files", dying)
        with pytest.raises(KeyboardInterrupt):
            pipeline.harvest(tiny_model, source, out, **ring)
    pipeline.harvest(tiny_model, source, out, **ring)
    pipeline.clean(out)
    assert contents(out) == contents(whole)


def test_a_marker_of_a_fallen_shard_is_mended_and_the_shard_stays_empty(
    tmp_path: Path, tiny_model: NativeModel
) -> None:
    ring = {"keep_rows": LANES * 32, "tokens": 4 * LANES * 32, "heldout_tokens": 64}
    out = tmp_path / "acts.zarr"
    source = text_source(made_up_documents(1500))
    pipeline.harvest(tiny_model, source, out, **ring)
    sound = contents(out)
    markers = out / "markers" / "train"
    (markers / "00000003.json").unlink()  # fallen long ago,
    (markers / "00000067.json").write_bytes(b"{")  # and the next of its lane,
    (markers / "00000195.json").unlink()  # and the one that stays
    assert ActivationStore.open(out).markers(TRAIN)[131].contexts == 0
    found, left = pipeline.repair(out, model=tiny_model, text=source)
    assert (len(found), left) == (3, [])
    assert contents(out) == sound


def test_a_training_does_not_continue_with_a_ring_that_moved_on(
    tmp_path: Path, tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = {"keep_rows": LANES * 32, "tokens": 4 * LANES * 32, "heldout_tokens": 64}
    source, out, real = text_source(made_up_documents(1500)), tmp_path / "acts.zarr", harvesting.harvest
    half = {HELD_OUT: range(2), TRAIN: range(2 * LANES)}
    with monkeypatch.context() as patch:
        patch.setattr(harvesting, "harvest", lambda *things, **how: real(*things, **(how | {"only": half})))
        pipeline.harvest(tiny_model, source, out, **ring)
    train = {"d_sae": 24, "tokens": 512, "config": {"k": 2, "batch_tokens": 128}}
    pipeline.train(out, tmp_path / "d", **train)
    pipeline.train(out, tmp_path / "d", **train)  # the same rows still
    pipeline.harvest(tiny_model, source, out, **ring)
    with pytest.raises(ValueError, match=r"other settings: .*rows\.store\.rows_sha256 is"):
        pipeline.train(out, tmp_path / "d", **train)


def test_a_ring_smaller_than_a_context_of_each_lane_is_refused(tmp_path: Path, tiny_model: NativeModel) -> None:
    with pytest.raises(ValueError, match="at least 2,048"):
        pipeline.harvest(
            tiny_model, text_source(made_up_documents(9)), tmp_path / "a.zarr", tokens=4096, keep_rows=1000
        )


def test_the_writer_thread_reports_what_went_wrong(
    tmp_path: Path, tiny_model: NativeModel, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 overflow in the middle of a harvest: the error names the row and the solution; earlier shards stay."""
    calls, real = [0], harvesting._activations

    def growing(*arguments: object) -> dict[str, np.ndarray]:
        calls[0] += 1
        rows = real(*arguments)  # type: ignore[arg-type]
        if calls[0] > 20:
            rows[HOOK_POINT][3, 2] = 1e5
        return rows

    monkeypatch.setattr(harvesting, "_activations", growing)
    out = tmp_path / "acts.zarr"
    with pytest.raises(StoreError, match=rf"{HOOK_POINT}: row \d+ .*100000, too large for float16.*dtype bfloat16"):
        pipeline.harvest(tiny_model, tiny_text, out, **BUDGET)
    store = ActivationStore.open(out)
    assert len(store.markers(HELD_OUT)) + len(store.markers(TRAIN)) == 20
