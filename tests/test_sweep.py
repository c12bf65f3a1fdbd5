"""A sweep: every run bit for bit as if trained alone, resumable, with a frontier as the evaluations say."""

from __future__ import annotations

import html
import json
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sae import pipeline
from sae.lm import NativeModel
from sae.pipeline import PipelineError
from sae.training import loop
from sae.training import step as training_step
from sae.training.config import TrainConfig
from sae.training.rows import Batch
from sae.training.state import TrainState

sweeping = import_module("sae.pipeline.sweep")  # `pipeline.sweep` is the function
GRID = {"recipes": ["topk", "towards-monosemanticity"], "d_sae": [24], "l0": [2.0, 4.0], "seeds": [1]}
RUN = {"tokens": 30 * 64, "config": {"batch_tokens": 64}}
pytestmark = pytest.mark.filterwarnings("ignore:.* was asked for:UserWarning")  # 30 steps are too few to find λ
FILES = ("sae.safetensors", "state.safetensors", "config.json", "train.json")


@pytest.fixture(scope="module")
def store(tiny_model: NativeModel, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "acts.zarr"
    return pipeline.harvest(tiny_model, tiny_text, out, tokens=2048, heldout_tokens=256)


@pytest.fixture(autouse=True)
def no_model_to_load(tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "evaluate", lambda path, **how: pipeline.evaluate(path, model=tiny_model, **how))


@pytest.mark.parametrize("max_ram_bytes", [10**9, 1], ids=["all at once", "one by one"])
def test_each_run_is_as_if_trained_alone_and_the_frontier_holds_its_evaluation(
    store: Path, tmp_path: Path, max_ram_bytes: int
) -> None:
    out = store.parent / f"sweep-{max_ram_bytes}"
    path = pipeline.sweep(store, out, **GRID, **RUN, max_ram_bytes=max_ram_bytes)
    frontier = json.loads(path.read_text())
    names = [f"{r}-24-l0_{n}-s1" for r in GRID["recipes"] for n in (2, 4)]
    assert [run["id"] for run in frontier["runs"]] == names
    for name, run in zip(names, frontier["runs"], strict=True):
        recipe, _, l0, _ = name.rsplit("-", 3)
        settings = {"target_l0": float(l0.removeprefix("l0_")), **RUN["config"]}
        alone = store.parent / f"alone-{max_ram_bytes}" / name
        pipeline.train(store, alone, recipe=recipe, d_sae=24, tokens=RUN["tokens"], seed=1, config=settings)
        for file in FILES:
            assert (out / name / file).read_bytes() == (alone / file).read_bytes(), file
        metrics = json.loads((out / name / "eval.json").read_text())["metrics"]
        assert all(run[metric] == metrics[metric]["value"] for metric in sweeping.MEASURED)
        assert (run["rows"], run["target_l0"]) == (RUN["tokens"], settings["target_l0"])
    by_k = {}
    for run in (json.loads((out / name / "eval.json").read_text()) for name in names):
        values = {name: run["metrics"][f"topk_units_{name}"]["value"] for name in sweeping.UNITS_MEASURED}
        by_k[run["units"]["k"]] = {"k": run["units"]["k"], **values}
    assert frontier["units"] == [by_k[k] for k in sorted(by_k)]
    svg = (out / "frontier.svg").read_text()
    ElementTree.fromstring(svg)
    assert "the k largest of the layer's own units" in html.unescape(svg)
    assert svg.count("largest units: L0") == 2 * len(by_k)  # in both panels
    before = {p: p.stat().st_mtime_ns for p in out.rglob("sae.safetensors")}
    pipeline.sweep(store, out, **GRID, **RUN)  # again: nothing is missing
    assert {p: p.stat().st_mtime_ns for p in out.rglob("sae.safetensors")} == before


def test_processes_take_whole_runs_and_the_last_writes_the_frontier(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pipeline.sweep(store, store.parent / "by-one", **GRID, **RUN)
    monkeypatch.setenv("WORLD_SIZE", "3")
    out = store.parent / "by-three"
    for rank, runs in ((2, 1), (1, 2)):  # of four: rank 0 has the first and the last
        monkeypatch.setenv("RANK", str(rank))
        assert pipeline.sweep(store, out, **GRID, **RUN, over_ranks=True) is None
        assert len([*out.glob("*/eval.json")]) == runs
    monkeypatch.setenv("RANK", "0")
    found = pipeline.sweep(store, out, **GRID, **RUN, over_ranks=True)
    assert expected
    assert found
    assert json.loads(found.read_text()) == json.loads(expected.read_text())


def test_a_run_that_diverges_is_recorded_and_the_others_continue(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_of = training_step.train_step

    def poisoned(state: TrainState, batch: Batch, config: TrainConfig) -> dict:
        if config.recipe == "towards-monosemanticity" and config.target_l0 == 2 and state.step == 17:
            state.sae.W_dec.data[0, 0] = float("inf")
        return step_of(state, batch, config)

    monkeypatch.setattr(loop, "train_step", poisoned)
    out = store.parent / "sweep-diverging"
    runs = json.loads(pipeline.sweep(store, out, **GRID, **RUN, max_ram_bytes=10**9).read_text())["runs"]
    lost = "towards-monosemanticity-24-l0_2-s1"
    assert [run["id"] for run in runs if "diverged" in run] == [lost]
    for run in runs:
        assert ((out / run["id"] / "sae.safetensors").is_file()) == (run["id"] != lost)
        assert (run["fvu"] is None) == (run["id"] == lost)
    (found,) = (run for run in runs if run["id"] == lost)
    assert "the loss is" in found["diverged"]
    assert "at step 18" in found["diverged"]
    assert found["target_l0"] == 2
    ElementTree.fromstring((out / "frontier.svg").read_text())
    monkeypatch.setattr(loop, "train_step", None)  # again: nothing is trained, not even the lost run
    assert json.loads(pipeline.sweep(store, out, **GRID, **RUN).read_text())["runs"] == runs


def test_runs_share_a_pass_only_if_rows_and_memory_allow(tmp_path: Path) -> None:
    points = sweeping.grid(tmp_path, ["topk", "batch-topk"], [64], [2.0], [0, 1], tokens=8192)
    assert [[p.config.seed for p in group] for group in sweeping._groups(points, 16, 10**9)] == [[0, 0], [1, 1]]
    assert all(len(group) == 1 for group in sweeping._groups(points, 16, 1))


def test_a_wrong_grid_is_refused_before_any_work(store: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"recipes": ["topk", "tpk"]}, "Did you mean 'topk'"),
        ({"l0": [2.5]}, "whole number"),
        ({"seeds": [1, 1]}, "twice"),
        ({"recipes": ["transcoder"]}, "another target"),
    ):
        with pytest.raises((ValueError, PipelineError), match=message):
            pipeline.sweep(store, tmp_path / "x", **(GRID | wrong), **RUN)
    assert not (tmp_path / "x").exists()
