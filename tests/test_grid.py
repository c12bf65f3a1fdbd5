"""scripts/grid.py: what is done is not done again, the file is whole at any moment, seeds share a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from grid import COLUMNS, Point, add, domain_table, main, missing, table  # noqa: E402


def entry(seed: int = 0, **figures: Any) -> dict[str, Any]:
    known = dict.fromkeys(COLUMNS, 0.5)
    return {
        "recipe": "topk",
        "d_sae": 64,
        "target_l0": 5.0,
        "seed": seed,
        "rows": 1000,
        "settings": {},
        "store_rows_sha256": "abc",
        **known,
        **figures,
    }


def point(seed: int = 0, tokens: int = 1000, settings: tuple[tuple[str, Any], ...] = ()) -> Point:
    return Point("topk", 64, 5.0, seed, tokens, settings)


def test_what_is_there_with_the_same_rows_is_not_trained_again() -> None:
    held = {point().name: entry()}
    assert missing([point(), point(1)], held, "abc") == [point(1)]
    assert missing([point()], held, "another store") == [point()]
    assert missing([point(tokens=2000)], held, "abc") == [point(tokens=2000)]
    assert missing([point(settings=(("lr", 2e-3),))], held, "abc")


def test_entries_are_added_one_by_one_and_seeds_share_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.json"
    for seed, score in enumerate((0.9, 0.96)):
        add(path, point(seed).name, entry(seed, ce_loss_score_zero=score, probe_k1=None))
    assert list(json.loads(path.read_text())) == [point(0).name, point(1).name]
    assert [p.name for p in tmp_path.iterdir()] == ["grid.json"]
    lines = table(json.loads(path.read_text())).splitlines()
    assert len(lines) == 3
    assert "| 5 | topk | 2 |" in lines[2]
    assert "| 0.93 (0.9 to 0.96) |" in lines[2]
    assert "|  |" in lines[2]  # what was not measured is empty, not a number
    monkeypatch.setattr(sys, "argv", ["grid.py", "--json", str(path)])
    assert main() == 0
    assert capsys.readouterr().out.splitlines() == lines


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
    assert domain_table(held, 7.0).splitlines() == ["| domain |  |", "|---|"]
