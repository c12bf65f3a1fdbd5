"""Trackers get the entries of metrics.jsonl, once for each step, also for a run that was cut off and resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeWandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sae.cli import main
from sae.jobs import trackers
from sae.jobs.trackers import Log, trackers_named
from sae.training.loop import train
from sae.training.recipes import resolve
from sae.training.rows import Batch

STEPS = 200
CONFIG = resolve("topk", d_sae=16, tokens=8 * STEPS, batch_tokens=8, k=2)[1]


class PowerCut(BaseException):
    pass


class Noise:
    d_in = 8

    def __init__(self, cut: int | None = None) -> None:
        self.cut = cut

    def batch(self, step: int) -> Batch:
        if step == self.cut:
            raise PowerCut
        return Batch(self.sample(8, step))

    def sample(self, n: int, seed: int) -> torch.Tensor:
        return torch.randn(min(n, 512), 8, generator=torch.Generator().manual_seed(seed))


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def cut_off_and_resumed(out: Path, name: str) -> list[dict[str, Any]]:
    """A run that logged up to step 150 when it was cut off, its last checkpoint earlier or none; the finished log."""
    tracked = trackers_named([name])
    with pytest.raises(PowerCut):
        train(Noise(cut=160), out, CONFIG, trackers=tracked, save_minutes=60)
    train(Noise(), out, CONFIG, trackers=tracked)
    return logged(out)


def test_tensorboard_reads_the_log(tmp_path: Path) -> None:
    log = cut_off_and_resumed(tmp_path, "tensorboard")
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    assert set(read.Tags()["scalars"]) == set(log[0]) - {"step"}
    for name in set(log[0]) - {"step"}:
        events = read.Scalars(name)
        assert [event.step for event in events] == [entry["step"] for entry in log]
        assert [event.value for event in events] == pytest.approx([entry[name] for entry in log], rel=1e-6)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_wandb_stays_offline_and_one_run(tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mine"
    log = cut_off_and_resumed(out, "wandb")
    assert [asked["mode"] for asked in wandb.asked] == ["offline", "offline"]
    assert len({asked["id"] for asked in wandb.asked}) == 1
    assert all(asked["resume"] == "allow" and asked["dir"] == str(out) for asked in wandb.asked)
    assert wandb.asked[0]["config"] == CONFIG.to_dict()
    assert wandb.finished == 2  # the run that was cut off too
    assert [{"step": step, **values} for step, values in wandb.told[1]] == log
    monkeypatch.setenv("WANDB_MODE", "online")
    train(Noise(), tmp_path / "sent", CONFIG, trackers=trackers_named(["wandb"]))
    assert wandb.asked[-1]["mode"] == "online"
    assert wandb.asked[-1]["id"] != wandb.asked[0]["id"]


def test_a_tracker_changes_nothing_and_hears_what_follows_the_checkpoint(tmp_path: Path) -> None:
    started: list[int] = []
    heard: list[int] = []

    @contextmanager
    def tracker(out: Path, settings: Mapping[str, Any], step: int) -> Iterator[Log]:
        started.append(step)
        yield lambda entry: heard.append(entry["step"])

    train(Noise(), tmp_path / "plain", CONFIG)
    with pytest.raises(PowerCut):
        train(Noise(cut=110), tmp_path / "tracked", CONFIG, trackers=[tracker], save_minutes=0)
    train(Noise(), tmp_path / "tracked", CONFIG, trackers=[tracker])
    assert started == [0, 110]
    assert heard == list(range(25, STEPS + 1, 25))
    for name in ("sae.safetensors", "state.safetensors", "config.json", "train.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "tracked" / name).read_bytes()


def test_a_missing_tracker_is_reported_before_any_work(
    tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    out = tmp_path / "none"
    assert main(["train", "--acts", str(tiny_store), "--out", str(out), "--log-to", "wandb"]) == 2
    assert "pip install 'monosem[wandb]'" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(ValueError, match="unknown tracker 'wanbd'"):
        trackers_named(["wanbd"])
