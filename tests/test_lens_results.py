"""The files of lenses: what is written is read back, nothing is written without controls, and halves do not mix."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.circuits.intervals import mean_interval, ratio_of_means
from sae.circuits.results import Control, Measure, Result, ResultError, read_result, results_in, write_result
from sae.jobs.checkpoint import CheckpointError, write_tensors

SCORE = Measure(0.5, 12, "prompts", "Σ a / Σ b", {"random": Control(0.1, "a random direction", (0.0, 0.2))}, (0.4, 0.6))
GRID = Measure(
    torch.arange(6.0).view(2, 3),
    7,
    "tokens",
    "mean",
    {"zero": Control(torch.zeros(2, 3), "nothing"), "one": Control(1.0, "a number")},
    (torch.arange(6.0).view(2, 3) - 1, torch.arange(6.0).view(2, 3) + 1),
    ("layer", "head"),
    version=3,
)
RESULT = Result(
    "circuit",
    {"score": SCORE, "grid": GRID},
    {"model": {"id": "tiny"}, "seed": 1},
    "ioi",
    {"layer": ["first", "second"]},
    {"extra": torch.ones(4)},
)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(same(v, vars(b)[k]) for k, v in vars(a).items()) if hasattr(a, "__dict__") else a == b


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write_result(RESULT, tmp_path / "lenses")
    assert path == tmp_path / "lenses" / "circuit-ioi.json"
    assert same(RESULT, read_result(path))
    assert results_in(tmp_path / "lenses") == {"circuit-ioi": path}
    entry = json.loads(path.read_text())["measures"]["score"]
    assert entry == {
        "value": 0.5,
        "ci95": [0.4, 0.6],
        "n": 12,
        "of": "prompts",
        "formula": "Σ a / Σ b",
        "version": 1,
        "axes": [],
        "controls": {"random": {"value": 0.1, "ci95": [0.0, 0.2], "what": "a random direction"}},
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(SCORE, controls={}), "has no controls, so it is not written"),
        (replace(SCORE, n=0), "count of at least 1"),
        (replace(GRID, axes=("layer",)), "name each axis"),
        (replace(GRID, ci95=(0.0, 1.0)), "its interval another one"),
    ],
)
def test_a_measure_that_says_too_little_is_not_written(tmp_path: Path, wrong: Measure, message: str) -> None:
    with pytest.raises(ResultError, match=message):
        write_result(replace(RESULT, measures={"score": SCORE, "wrong": wrong}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_cannot_leave_the_directory(tmp_path: Path) -> None:
    for wrong in (replace(RESULT, task="../x"), replace(RESULT, measures={"a/b": SCORE})):
        with pytest.raises(ResultError, match="cannot name a"):
            write_result(wrong, tmp_path)


def test_arrays_of_another_run_are_refused(tmp_path: Path) -> None:
    path = write_result(RESULT, tmp_path)
    beside = path.with_suffix(".safetensors")
    write_tensors(beside, {"extra": torch.zeros(4)}, {})
    with pytest.raises(ResultError, match="does not belong to circuit-ioi.json"):
        read_result(path)
    beside.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        read_result(path)
    write_result(RESULT, tmp_path)
    write_result(replace(RESULT, measures={"score": SCORE}, arrays={}), tmp_path)
    assert not beside.exists()
    assert read_result(path).measures.keys() == {"score"}


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in ("not JSON", "[]", "{}", '{"format": 99}'):
        path.write_text(content)
        with pytest.raises(ResultError, match="result of a lens|format 99"):
            read_result(path)


def test_a_missing_value_stays_missing(tmp_path: Path) -> None:
    path = write_result(replace(RESULT, measures={"score": replace(SCORE, value=math.nan)}), tmp_path)
    assert math.isnan(float(read_result(path).measures["score"].value))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """2,000 samples whose mean and ratio are known: 95% of the intervals hold them (standard error 0.5%)."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(60, 2000, generator=g) + shift for shift in (3.0, 5.0))
    low, high = mean_interval(a)
    assert abs(((low < 3) & (high > 3)).double().mean() - 0.95) < 0.02
    held = []
    for over, under in zip((a + b).T, b.T, strict=True):
        ratio, (low, high) = ratio_of_means(over, under)
        assert torch.isclose(ratio, (over.double().sum() / under.double().sum()))
        held.append(bool(low < 8 / 5 < high))
    assert abs(sum(held) / len(held) - 0.95) < 0.02
