"""scripts/grid.py: finished runs are measured once, the file is whole at any moment, seeds share a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import HOOK_POINT

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import grid  # noqa: E402
from grid import COLUMNS, add, domain_table, is_measured, main, name_of, results_table  # noqa: E402

from sae import pipeline  # noqa: E402


def run(seed: int = 0, rows: int = 1000, **settings: Any) -> dict[str, Any]:
    return {
        "recipe": "topk",
        "d_sae": 64,
        "target_l0": 5.0,
        "seed": seed,
        "rows": rows,
        "settings": settings,
        "store_rows_sha256": "abc",
    }


def entry(seed: int = 0, **figures: Any) -> dict[str, Any]:
    return run(seed) | dict.fromkeys(COLUMNS, 0.5) | figures


def test_what_is_there_with_the_same_rows_is_not_measured_again() -> None:
    held = {name_of(run()): entry()}
    assert is_measured(run(), held)
    assert not is_measured(run(1), held)
    assert not is_measured(run() | {"store_rows_sha256": "another store"}, held)
    assert not is_measured(run(rows=2000), held)
    assert not is_measured(run(lr=2e-3), held)


def test_the_published_entries_have_the_names_that_runs_get_now() -> None:
    published = Path(__file__).parents[1] / "docs" / "measurements" / "sparse-model" / "grid.json"
    entries = grid.read_entries(published)
    assert len(entries) > 40
    assert [name_of(entry) for entry in entries.values()] == list(entries)


def test_entries_are_added_one_by_one_and_seeds_share_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.json"
    for seed, score in enumerate((0.9, 0.96)):
        add(path, name_of(run(seed)), entry(seed, ce_loss_score_zero=score, probe_k1=None))
    assert list(json.loads(path.read_text())) == [name_of(run(0)), name_of(run(1))]
    assert [p.name for p in tmp_path.iterdir()] == ["grid.json"]
    lines = results_table(json.loads(path.read_text())).splitlines()
    assert len(lines) == 3
    assert "| topk | 5 | 2 |" in lines[2]
    assert "| 0.93 (0.9 to 0.96) |" in lines[2]
    assert "|  |" in lines[2]  # what was not measured is empty, not a number
    monkeypatch.setattr(sys, "argv", ["grid.py", "--json", str(path)])
    assert main() == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_the_runs_of_a_sweep_become_entries(
    tmp_path: Path, tiny_store: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"batch_tokens": 256, "lr": 2e-3}
    recipes = ("batch-topk", "topk")
    pipeline.sweep(tiny_store, tmp_path / "sweep", recipes=recipes, d_sae=[48], l0=[4], tokens=4096, config=settings)
    path = tmp_path / "grid.json"
    monkeypatch.setattr(sys, "argv", ["grid.py", str(tmp_path), "--json", str(path)])
    assert main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
    entries = json.loads(path.read_text())
    assert list(entries) == [f"{name}-48-l0_4-batch_tokens_256-lr_0.002-0.004096M-s0" for name in recipes]
    for recipe, found in zip(recipes, entries.values(), strict=True):
        directory = tmp_path / "sweep" / f"{recipe}-48-l0_4-s0"
        about, result = (json.loads((directory / name).read_text()) for name in ("config.json", "eval.json"))
        assert found["settings"] == settings
        assert found["lambda"] == about["lambda"]["scaled"]
        assert about["hook_point"] == HOOK_POINT
        assert found["fvu"] == result["metrics"]["fvu"]["value"]
        assert 0 < found["probe_k1"] <= 1
        assert found["best_f1"].keys() == {"prose", "dna", "numbers"}
    monkeypatch.setattr(grid, "measure", lambda directory: pytest.fail(f"{directory} is measured a second time"))
    assert main() == 0


def test_domains_have_a_line_and_recipes_a_column() -> None:
    held = {
        "a": entry(0, best_f1={"dna": 0.5, "hex": None}),
        "b": entry(1, best_f1={"dna": 0.7, "hex": 0.25}),
        "c": entry(0, best_f1={"dna": 0.1}, recipe="gated"),
        "d": entry(0, best_f1={"dna": 0.9}, target_l0=20.0),
        "e": entry(0, best_f1={"dna": 0.3}, rows=3000),
    }
    assert domain_table(held, 5.0).splitlines() == [
        "| domain | topk | gated | topk, 3,000 rows |",
        "|---|--:|--:|--:|",
        "| dna | 0.6 (0.5 to 0.7) | 0.1 | 0.3 |",
        "| hex | 0.25 |  |  |",
    ]
    assert domain_table(held, 7.0).splitlines() == ["| domain |", "|---|"]
