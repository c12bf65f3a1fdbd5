"""The run page and the start page, against run directories written by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser_fixture import write_sae_directory

from browser import charts, data, runs


def write_log(folder: Path, lines: int, tail: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"step": 25 * i, "rows": 1000 * i, "fvu": 1 / i, "rows_per_s": 500} for i in range(1, lines + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)


def begin(folder: Path, **train: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"train": {"recipe": "topk", "d_sae": 8, "tokens": 10_000} | train, "rows": {"hook_point": "h"}}
    (folder / "train.json").write_text(json.dumps(content))


def test_a_log_is_thinned_keeping_both_ends_without_incomplete_lines(tmp_path: Path) -> None:
    write_log(tmp_path, 1000, tail='{"step": 9')
    log = runs.read_log(tmp_path / "metrics.jsonl", points=50)
    assert 48 <= len(log) <= 50
    assert log["step"].iloc[0] == 25
    assert log["step"].is_monotonic_increasing
    write_log(tmp_path, 30)
    assert runs.read_log(tmp_path / "metrics.jsonl", points=50)["step"].tolist() == [25 * i for i in range(1, 31)]
    assert runs.read_log(tmp_path / "nothing.jsonl").empty
    (tmp_path / "metrics.jsonl").write_text("[1]\n\n{}\n")
    assert len(runs.read_log(tmp_path / "metrics.jsonl")) == 1


def test_a_run_in_training_is_found_and_its_progress_reported(tmp_path: Path) -> None:
    begin(tmp_path / "a" / "sae")
    (entry,) = data.scan(tmp_path)
    assert (entry.id, entry.unfinished, entry.d_sae) == ("a/sae", True, 8)
    assert entry.config["hook_point"] == "h"

    def now(seconds_later: float) -> runs.Progress:
        log = runs.read_log(entry.path / "metrics.jsonl")
        written = (entry.path / "metrics.jsonl").stat().st_mtime if len(log) else 0.0
        return runs.progress_of(entry, log, written + seconds_later)

    assert now(0).state == "empty"
    write_log(entry.path, 4)
    assert (now(5).state, now(5).rows, now(5).total) == ("training", 4000, 10_000)
    assert now(runs.QUIET_S + 1).state == "stopped"
    write_sae_directory(tmp_path / "b" / "sae", d_sae=8)
    finished = data.scan(tmp_path)[1]
    assert runs.progress_of(finished, runs.read_log(finished.path / "metrics.jsonl")).state == "trained"
    (tmp_path / "a" / "sae" / "train.json").write_text("[]")  # damaged: no run, no crash
    assert [found.id for found in data.scan(tmp_path)] == ["b/sae"]


def test_fidelity_and_group_tables_use_the_metrics_that_exist() -> None:
    report = {
        "metrics": {"zeta": {"value": 1.0}, "fvu": {"value": 0.1, "ci95": [0.05, 0.2], "formula": "f"}, "l0": 3.0},
        "controls": {"random": {"l0": {"value": 2.0}, "note": "x", "tokens": 5}, "shuffled": {"l0": 1.0, "tokens": 9}},
    }
    table = runs.fidelity_table(report)
    assert table["metric"].tolist() == ["l0", "fvu", "zeta"]
    assert table.loc[1, ["value", "low", "high"]].tolist() == [0.1, 0.05, 0.2]
    groups = runs.group_table(report["controls"], "control")
    assert groups["control"].tolist() == ["shuffled", "random"]
    assert groups["l0"].tolist() == [1.0, 2.0]
    assert runs.fidelity_table({}).empty
    assert runs.density_table({"density": {"log10_density_edges": [0, 1], "features": [1, 2, 3]}}).empty


def evaluated(l0: float, k: int, verdict: str | None = None) -> dict[str, Any]:
    """An eval.json with the baseline, as `sae eval` writes it."""
    values = {
        "l0": l0,
        "fvu": 0.2,
        "ce_loss_score_zero": 0.9,
        "units_l0": 13.4,
        "units_participation_ratio": 4.6,
        "topk_units_l0": k - 1.0,
        "topk_units_fvu": 0.1 / k,
        "topk_units_ce_loss_score_zero": 0.8,
    }
    metrics = {name: {"value": value, "ci95": [value, value], "formula": name} for name, value in values.items()}
    return {"metrics": metrics, "units": {"n_units": 512, "k": k, "verdict": verdict}}


def test_the_layers_own_units_are_a_column_of_the_table_and_not_rows() -> None:
    table = runs.fidelity_table(evaluated(19.2, 19)).set_index("metric")
    assert set(table.index) == {"l0", "fvu", "ce_loss_score_zero", "units_l0", "units_participation_ratio"}
    assert table.loc["fvu", "units"] == pytest.approx(0.1 / 19)
    assert table["units"].isna().sum() == 2
    own = runs.baseline_of(evaluated(19.2, 19, "as faithful"))
    assert own == runs.Baseline(
        512, 13.4, 4.6, 19, {"l0": 18.0, "fvu": 0.1 / 19, "ce_loss_score_zero": 0.8}, "as faithful"
    )
    of_version_0_1 = {"metrics": {"l0": {"value": 3.0}}}
    assert runs.baseline_of(of_version_0_1) is None
    assert runs.fidelity_table(of_version_0_1)["units"].isna().all()


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ([0, 40, 80, 40, 0, 0, 0, 60, 200, 60, 0], [160, 320]),
        ([0, 5, 20, 60, 90, 60, 20, 5, 0, 0, 0], [260]),
        ([0] * 11, []),
        ([0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0], [7]),
    ],
)
def test_clusters_of_densities(counts: list[int], sizes: list[int]) -> None:
    edges = np.linspace(-8, 0, 12)
    histogram = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": counts})
    found = runs.clusters(histogram)
    assert [n for _, _, n in found] == sizes
    assert sum(sizes) == sum(counts)
    assert all(low < high for low, high, _ in found)


def test_a_sweep_is_the_evaluated_dictionaries_of_one_directory(tmp_path: Path) -> None:
    for name in ("sweep/a", "sweep/b", "sweep/c", "other/d"):
        write_sae_directory(tmp_path / name, d_sae=8)
        report = {"metrics": {"l0": {"value": len(name)}, "fvu": {"value": 0.5}}}
        (tmp_path / name / "eval.json").write_text(json.dumps(report if name != "sweep/c" else {}))
    entries = {entry.id: entry for entry in data.scan(tmp_path)}
    table = runs.frontier(entries["sweep/a"], entries.values())
    assert table["id"].tolist() == ["sweep/a", "sweep/b"]
    assert table["this"].tolist() == [True, False]
    assert table["units_k"].isna().all()
    (tmp_path / "sweep/b/eval.json").write_text(json.dumps(evaluated(5.1, 5)))
    table = runs.frontier(entries["sweep/a"], entries.values()).set_index("id")
    assert table.loc["sweep/b", ["units_k", "units_l0", "units_fvu"]].tolist() == [5, 4.0, 0.02]
    for some in (table, table.loc[["sweep/a"]]):  # with a line for the units, and without
        charts.frontier_chart(some.reset_index()).to_dict()


def test_cost_is_the_logged_time_and_the_file_sizes(tmp_path: Path) -> None:
    write_sae_directory(tmp_path / "sae", d_sae=8)
    write_log(tmp_path / "sae", 60)
    (tmp_path / "sae" / "sae.safetensors").write_bytes(b"0" * 1_500_000)
    (entry,) = data.scan(tmp_path)
    found = runs.cost(entry, runs.read_log(entry.path / "metrics.jsonl"))
    assert found == {"training": "2.0 min", "pace": "500 tokens/s", "sae.safetensors": "1.5 MB"}
    os.remove(entry.path / "metrics.jsonl")
    assert "training" not in runs.cost(entry, runs.read_log(entry.path / "metrics.jsonl"))
