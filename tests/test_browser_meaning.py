"""Search by meaning in the app and its JSON, with a text model whose truth is known."""

from __future__ import annotations

import shutil
import sqlite3
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from browser_fixture import ARABIC, DEAD, DNA
from browser_pages import html, run_page
from fakes import WordCounts
from starlette.applications import Starlette
from starlette.testclient import TestClient
from streamlit.testing.v1 import AppTest

import sae
from browser import api, launch
from browser.live import LiveError, search
from browser.state import ROOT_VARIABLE
from sae.text import embedding
from store.notes import NAME, Note, Notes


@pytest.fixture
def directory(planted_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "runs"
    shutil.copytree(planted_root, root)
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    found = root / "demo" / "tm"
    (found / NAME).unlink(missing_ok=True)
    Notes(found).put(Note(20, "chemistry chemistry"))
    Notes(found).put(Note(DEAD, "chemistry and law"))
    return found


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> WordCounts:
    fake = WordCounts(["chemistry", "law", "arabic", "dna"])
    monkeypatch.setattr(search, "is_installed", lambda: True)
    monkeypatch.setattr(search, "load_model", lambda: fake)
    module = import_module("sae.pipeline.search")  # `pipeline.search` is the function
    monkeypatch.setattr(module, "load_text_model", lambda directory: fake)
    search._kept.clear()
    return fake


@pytest.fixture
def visit(directory: Path) -> Any:
    def go(**params: str) -> AppTest:
        return run_page(**{"sae": "demo/tm", **params})

    return go


@pytest.fixture
def client(directory: Path) -> TestClient:
    return TestClient(Starlette(routes=api.routes()), base_url="http://localhost:8501")


def test_the_table_is_ranked_as_the_function_and_the_json_rank(
    visit: Any, client: TestClient, directory: Path, words: WordCounts
) -> None:
    table = visit(meaning="arabic").dataframe[0].value
    answer = client.get("/api/features", params={"sae": "demo/tm", "meaning": "arabic"}).json()
    rows, middle = answer["features"], answer["median_similarity"]
    found = sae.search(directory, "arabic", n=10_000)["features"]
    by_feature = table.set_index("feature")["similarity"]
    assert by_feature[ARABIC] == pytest.approx(1, abs=1e-3)  # its text has no other word of the model's
    assert by_feature[DNA] == pytest.approx(0, abs=1e-2)
    assert table["feature"].tolist() == [each["feature"] for each in found] == [each["feature"] for each in rows]
    assert table["similarity"].tolist() == pytest.approx([each["similarity"] for each in found])
    assert [each["similarity"] for each in rows] == pytest.approx([each["similarity"] for each in found])
    assert middle == pytest.approx(sae.search(directory, "arabic")["median_similarity"])
    assert len({len(words.asked), len(set(words.asked))}) == 1  # each text was embedded once, for all three


def test_the_filters_apply_as_well(visit: Any, client: TestClient, words: WordCounts) -> None:
    table = visit(meaning="chemistry").dataframe[0].value
    assert set(table["feature"].iloc[:2]) == {20, DEAD}
    assert visit(meaning="chemistry", flag="dead").dataframe[0].value["feature"].tolist() == [DEAD]
    asked = {"sae": "demo/tm", "meaning": "chemistry", "domain": "dna"}
    rows = client.get("/api/features", params=asked).json()["features"]
    assert DNA in [row["feature"] for row in rows]
    assert {row["domain"] for row in rows} == {"dna"}


def test_a_label_that_is_saved_is_found_at_once(visit: Any, directory: Path, words: WordCounts) -> None:
    assert visit(meaning="law").dataframe[0].value["feature"].iloc[0] == DEAD
    Notes(directory).put(Note(5, "law"))
    assert visit(meaning="law").dataframe[0].value["feature"].iloc[0] == 5


def test_no_feature_passes(visit: Any, words: WordCounts) -> None:
    assert "No feature passes these filters" in html(visit(meaning="law", q="nothing has this in it"))


def test_without_the_extra_the_box_says_what_to_install(
    visit: Any, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding.load_text_model.cache_clear()
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    page = visit(q="chemistry")
    assert page.text_input(key="meaning").disabled
    assert "monosem[search]" in page.text_input(key="meaning").placeholder
    assert len(page.dataframe[0].value) == 2  # the search for words works
    assert "cannot be searched" not in html(page)
    link = visit(meaning="chemistry", q="chemistry")
    assert "The features cannot be searched by meaning" in html(link)
    assert "monosem[search]" in html(link)
    assert len(link.dataframe[0].value) == 2
    answer = client.get("/api/features", params={"sae": "demo/tm", "meaning": "chemistry"})
    assert answer.status_code == 409
    assert "pip install 'monosem[search]'" in answer.json()["error"]


def test_a_text_model_that_fails_leaves_the_table(
    visit: Any, words: WordCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise LiveError("the text model could not be loaded (OSError: no such weights)")

    monkeypatch.setattr(search, "load_model", fail)
    page = visit(meaning="chemistry")
    assert "The features cannot be searched by meaning" in html(page)
    assert "no such weights" in html(page)
    assert len(page.dataframe[0].value) > 2


def test_damaged_notes_leave_the_table(visit: Any, directory: Path, words: WordCounts) -> None:
    (directory / NAME).unlink()
    with sqlite3.connect(directory / NAME) as database:
        database.execute("CREATE TABLE notes (feature INTEGER)")
    (directory / NAME).write_bytes(b"SQLite format 3\x00" + bytes(200))
    assert "The features cannot be searched by meaning" in html(visit(meaning="chemistry"))


def test_the_app_is_told_its_text_model(tmp_path: Path) -> None:
    told = launch.environment(tmp_path, text_model=tmp_path)
    assert told[launch.TEXT_MODEL_VARIABLE] == str(tmp_path)
    with pytest.raises(ValueError, match="--text-model .*nowhere: no directory here"):
        launch.launch(tmp_path, port=8501, open_browser=False, text_model=tmp_path / "nowhere")
