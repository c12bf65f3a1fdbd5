"""Files written whole or not at all, and Adam's state saved and restored."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from sae.jobs import checkpoint
from sae.jobs.checkpoint import CheckpointError, adam_tensors, read_header, read_tensors, restore_adam, write_tensors
from sae.jobs.directory import claim
from store.common import write_json

TENSORS = {
    "a": torch.randn(3, 4),
    "view": torch.randn(4, 3).T,
    "empty": torch.zeros(0, 2),
    "count": torch.tensor([2**40]),
    "scalar": torch.tensor(1.5),
    "half": torch.randn(5).half(),
    "brain": torch.randn(5).bfloat16(),
    "flags": torch.tensor([True, False]),
    "extremes": torch.tensor([torch.inf, -0.0, torch.nan, 1e-45]),
}
HEADER = {"step": 7, "scale": 0.1 + 0.2, "text": "‖x‖", "nested": [{"a": None}]}


def test_tensors_and_header_come_back_exactly(tmp_path: Path) -> None:
    write_tensors(tmp_path / "deep" / "x.safetensors", TENSORS, HEADER)
    found, header = read_tensors(tmp_path / "deep" / "x.safetensors")
    assert header == HEADER
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        )
    assert stat.S_IMODE(os.stat(tmp_path / "deep" / "x.safetensors").st_mode) == 0o644


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", TENSORS, HEADER)
    write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), dict(reversed(HEADER.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("fails", ["sae.jobs.checkpoint.save_file", "store.common.fsync", "store.common.os.replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(fails, fail)
    with pytest.raises(OSError, match="no space"):
        write_tensors(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors.0123.partial").write_bytes(b"half")
    (tmp_path / ".x.safetensors.0123.tmp").write_bytes(b"half, by version 0.1")
    (tmp_path / ".other.safetensors.0123.tmp").write_bytes(b"another's")
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.safetensors.0123.tmp", "x.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_torn_file_is_refused_with_what_to_do(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file .*Delete it and run the command"):
        read_tensors(path)


def test_json_is_written_whole_and_holds_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "x.json", {"b": [1, None, "é"], "a": 0.1})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"b": [1, None, "é"], "a": 0.1}
    with pytest.raises(ValueError, match="[Oo]ut of range float"):
        write_json(tmp_path / "a" / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a" / "x.json").read_text())["a"] == 0.1
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.json"]


@pytest.mark.parametrize("fused", [False, True])
def test_adam_continues_as_if_it_had_not_stopped(tmp_path: Path, fused: bool) -> None:
    def start() -> tuple[list[torch.nn.Parameter], torch.optim.Adam]:
        g = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in ((3, 7), (5,))]
        return parameters, torch.optim.Adam(parameters, lr=0.1, fused=fused)

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Adam, number: int) -> None:
        g = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=g)
        optimizer.step()

    unbroken, optimizer = start()
    for number in range(6):
        step(unbroken, optimizer, number)
    first, optimizer = start()
    for number in range(3):
        step(first, optimizer, number)
    names = ["w", "b"]
    saved = dict(zip(names, first, strict=True)) | adam_tensors(optimizer, names)
    write_tensors(tmp_path / "s", saved, {})
    tensors, _ = read_tensors(tmp_path / "s")
    second, optimizer = start()
    with torch.no_grad():
        for name, parameter in zip(names, second, strict=True):
            parameter.copy_(tensors[name])
    restore_adam(optimizer, names, tensors)
    for number in range(3, 6):
        step(second, optimizer, number)
    assert all(torch.equal(a, b) for a, b in zip(unbroken, second, strict=True))


def test_adam_before_its_first_step_has_no_state() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    assert checkpoint.adam_tensors(optimizer, ["p"]) == {}
    restore_adam(optimizer, ["p"], {})
    assert not optimizer.state


def test_a_header_is_read_without_its_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)}, {"step": 7})
    assert read_header(tmp_path / "a.safetensors") == {"step": 7}
    assert read_header(tmp_path / "missing.safetensors") == {}
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(tmp_path / "a.safetensors")


def test_what_only_version_0_1_recorded_does_not_make_another_run(tmp_path: Path) -> None:
    model = {"id": "m", "sha256": "aa"}
    claim(tmp_path, "train.json", {"rows": {"model": model | {"older_sha256": "bb"}}})
    claim(tmp_path, "train.json", {"rows": {"model": model}})
    with pytest.raises(ValueError, match="rows.model.sha256 is 'aa' there, 'cc' asked for"):
        claim(tmp_path, "train.json", {"rows": {"model": model | {"sha256": "cc"}}})
