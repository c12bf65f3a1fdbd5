"""The pages Heads and Patching: saved results of lenses with their controls, and the pattern of a head."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser_live_fixture import NAMES
from browser_pages import html, payloads, run_page
from streamlit.testing.v1 import AppTest

from browser import lens_results
from browser.data import read_config, scan
from browser.lens_results import LensFileError
from browser.state import ROOT_VARIABLE
from sae.circuits.results import Control, Measure, Result, write_result
from sae.lm import NativeModel

PROMPT = "the quick brown fox"


def measure(value: torch.Tensor, axes: tuple[str, ...]) -> Measure:
    control = Control(value - 1, "one less")
    return Measure(value, 5, "texts", "a formula", {"no_repeats": control}, (value - 0.1, value + 0.1), axes)


@pytest.fixture(scope="module")
def results_root(live_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two results about the dictionary's model, one about another model, and one about the dictionary."""
    root = tmp_path_factory.mktemp("lenses")
    shutil.copytree(live_root / NAMES[0], root / NAMES[0])
    about = {"model": read_config(root / NAMES[0] / "config.json")["model"]}
    directory = root / "lenses" / Path(about["model"]["id"]).name
    scores = torch.tensor([[0.25, 0.5]])
    trigrams = [{"best": [{"skip_trigram": "a … b → <b>c", "score": 1.0}], "forced_pairs": []}]
    write_result(
        Result(
            "heads", {"prefix_matching": measure(scores, ("layer", "head"))}, about, labels={"skip_trigrams": trigrams}
        ),
        directory,
    )
    labels = {
        "site": ["L0.head.0"],
        "place": ["end", "first"],
        "first_prompts": ["a b <i>", "b a <i>"],
        "logit_difference": {"clean": 3.0, "corrupt": -3.0},
    }
    grid = measure(torch.tensor([[0.75, 0.125]]), ("site", "place"))
    patched = Result("circuit", {"restoring_head": grid}, about | {"task": "induction"}, "induction", labels)
    write_result(patched, directory)
    write_result(Result("circuit", patched.measures, {"model": {"sha256": "other"}}, "foreign"), directory)
    write_result(
        Result("keys", {"share": Measure(0.5, 5, "texts", "f", {"none": Control(0.0, "nothing")})}, about),
        root / NAMES[0] / "lenses",
    )
    return root


@pytest.fixture
def visit(results_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def go(where: Path = results_root, **params: str) -> AppTest:
        monkeypatch.setenv(ROOT_VARIABLE, str(where))
        return run_page(**({"sae": NAMES[0], "prompt": PROMPT} | params))

    return go


def test_results_are_found_by_the_model_and_read_as_they_were_written(results_root: Path) -> None:
    (entry,) = scan(results_root)
    found = lens_results.find(entry, results_root)
    assert found.keys() == {"heads", "circuit-induction", "keys"}
    result = lens_results.read(found["circuit-induction"])
    table = lens_results.table(result, "restoring_head")
    assert table["value"].tolist() == [0.75, 0.125]
    assert table["no_repeats"].tolist() == [-0.25, -0.875]
    assert table["low"].tolist() == pytest.approx([0.65, 0.025])
    assert table["place"].tolist() == ["end", "first"]
    assert lens_results.table(lens_results.read(found["keys"]), "share")["none"].tolist() == [0.0]


def test_a_damaged_result_says_what_to_do(results_root: Path, tmp_path: Path) -> None:
    (entry,) = scan(results_root)
    source = lens_results.find(entry, results_root)["heads"]
    shutil.copy(source, tmp_path / "heads.json")
    with pytest.raises(LensFileError, match="Run `sae lens` again"):
        lens_results.read(tmp_path / "heads.json")
    (tmp_path / "new.json").write_text('{"format": 99}')
    with pytest.raises(LensFileError, match="format 99"):
        lens_results.read(tmp_path / "new.json")


def test_heads_shows_scores_controls_and_the_pattern(visit: Any, tiny_model: NativeModel) -> None:
    page = visit(view="Heads", head="1")
    every, one = (page.dataframe[i].value for i in (0, 1))
    assert every["prefix_matching"].tolist() == [0.25, 0.5]
    assert one["no_repeats"].tolist() == [-0.75, -0.5]
    assert any("no_repeats: one less" in caption.value for caption in page.caption)
    (grid,) = (p for p in payloads(page.main) if "cells" in p)
    ids = torch.tensor([tiny_model.encode_prompt(PROMPT)])
    pattern = tiny_model.attention(ids, 0).pattern[1].numpy()
    sent = np.zeros_like(pattern)
    for row, column, value in grid["cells"]:
        sent[row, column] = value
    assert np.abs(sent - np.where(pattern > 0.005, pattern, 0)).max() < 1e-4


def test_patching_shows_both_prompts_and_a_measure_with_its_controls(visit: Any) -> None:
    page = visit(view="Patching", result="circuit-induction")
    assert page.dataframe[0].value["value"].tolist() == [0.75, 0.125]
    shown = html(page)
    assert "a b &lt;i&gt;" in shown
    assert "+3.00" in shown
    page = visit(view="Patching", result="keys")
    assert page.dataframe[0].value["none"].tolist() == [0.0]


@pytest.mark.parametrize(("view", "command"), [("Heads", "sae lens heads"), ("Patching", "sae lens circuit")])
def test_without_a_result_the_page_names_the_command(visit: Any, live_root: Path, view: str, command: str) -> None:
    assert command in html(visit(where=live_root, view=view))
