"""Named lists of features: what is kept, what is refused, several sessions at once, and files to exchange."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from browser_pages import html, run_page
from hypothesis import given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from browser.named_lists import MAX_NAME, Lists, read_lists, to_csv, to_json
from browser.state import ROOT_VARIABLE
from store.notes import NAME, Note, Notes, NotesError

D_SAE = 64


def test_lists_are_made_changed_renamed_and_deleted(tmp_path: Path) -> None:
    lists = Lists(tmp_path)
    assert lists.all() == {}
    assert not (tmp_path / NAME).exists()  # looking leaves nothing behind
    assert lists.add(" DNA ", [7, 3]) == "DNA"
    lists.add("DNA", [9, 3])
    lists.add("to read")
    assert Lists(tmp_path).all() == {"DNA": [7, 3, 9], "to read": []}
    lists.remove("DNA", [3, 55])
    assert lists.rename("DNA", "DNA, checked") == "DNA, checked"
    assert lists.all() == {"DNA, checked": [7, 9], "to read": []}
    lists.rename("to read", "to read")
    lists.delete("DNA, checked")
    assert lists.all() == {"to read": []}
    lists.add("DNA, checked")
    assert lists.all()["DNA, checked"] == []  # the deleted list's features are gone


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    lists = Lists(tmp_path)
    for name in ("", "  ", "x" * (MAX_NAME + 1), "two\nlines", "\u202eevil"):
        with pytest.raises(NotesError, match="cannot name a list"):
            lists.add(name, [1])
    assert not (tmp_path / NAME).exists()
    lists.merge({"a": [1], "b": [2]})
    with pytest.raises(NotesError, match="already a list “b”"):
        lists.rename("a", "b")
    with pytest.raises(NotesError, match="cannot name a list"):
        lists.merge({"c": [3], "": [4]})
    for change in (lambda: lists.remove("c", [1]), lambda: lists.delete("c"), lambda: lists.rename("c", "d")):
        with pytest.raises(NotesError, match="no list “c”"):
            change()
    assert lists.all() == {"a": [1], "b": [2]}


def test_notes_of_version_0_1_open_unchanged_and_live_beside_lists(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / NAME)
    with database:  # the table as version 0.1 made it
        database.execute(
            "CREATE TABLE notes (feature INTEGER PRIMARY KEY, label TEXT NOT NULL DEFAULT '', note TEXT NOT NULL "
            "DEFAULT '', bookmarked INTEGER NOT NULL DEFAULT 0, changed TEXT NOT NULL DEFAULT '') STRICT"
        )
        database.execute("INSERT INTO notes VALUES (5, 'base64', 'a note', 1, '2025-01-01')")
    database.close()
    before = (tmp_path / NAME).read_bytes()
    assert Lists(tmp_path).all() == {}
    assert Notes(tmp_path).all() == [Note(5, "base64", "a note", True, "2025-01-01")]
    assert (tmp_path / NAME).read_bytes() == before  # reading changed nothing
    Lists(tmp_path).add("mine", [5])
    assert Notes(tmp_path).get(5).label == "base64"
    Notes(tmp_path).put(Note(6, "new"))
    assert Lists(tmp_path).all() == {"mine": [5]}


def test_sessions_that_add_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    def add(number: int) -> None:
        Lists(tmp_path).add(f"list {number % 2}", range(number * 10, number * 10 + 10))

    with ThreadPoolExecutor(8) as sessions:
        list(sessions.map(add, range(8)))
    found = Lists(tmp_path).all()
    assert {name: sorted(features) for name, features in found.items()} == {
        f"list {part}": sorted(n * 10 + i for n in range(part, 8, 2) for i in range(10)) for part in (0, 1)
    }


names = st.text(min_size=1, max_size=MAX_NAME).filter(lambda name: name.isprintable() and name == name.strip() != "")


@given(st.dictionaries(names, st.lists(st.integers(0, D_SAE - 1), unique=True, max_size=6), min_size=1, max_size=4))
def test_every_list_survives_json_and_csv(lists: dict[str, list[int]]) -> None:
    assert read_lists(to_json(lists), D_SAE) == lists
    assert read_lists(to_csv(lists), D_SAE) == lists
    for name, *_ in list(csv.reader(io.StringIO(to_csv(lists).decode())))[1:]:
        assert name.startswith('"')  # never a formula of a spreadsheet


def test_lists_written_by_hand_are_read() -> None:
    written = "\ufefflist,feature\r\nmine,3\r\nmine, 5\r\nempty,\r\n\r\n".encode()
    assert read_lists(written, D_SAE) == {"mine": [3, 5], "empty": []}
    told = {"kind": "feature-lists", "format": 1, "lists": [{"name": " a ", "features": [1]}]}
    assert read_lists(json.dumps(told).encode(), D_SAE) == {"a": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON, or CSV"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{", "not JSON"),
        (b'{"kind": "notes"}', "holds no feature lists"),
        (b'{"kind": "feature-lists", "format": 1}', 'Entry 0 of "lists"'),
        (b'{"kind": "feature-lists", "format": 1, "lists": []}', "holds no list"),
        (b'{"kind": "feature-lists", "format": 1, "lists": [{"name": "a", "features": [true]}]}', "Entry 0"),
        (b'{"kind": "feature-lists", "format": 1, "lists": [{"name": "a", "features": [1.5]}]}', "Entry 0"),
        (b'{"kind": "feature-lists", "format": 1, "lists": [{"name": "a", "features": [64]}]}', "0 to 63"),
        (b"list,feature\na,64\n", "another dictionary"),
        (b"list,feature\na,-1\n", "Line 2"),
        (b"list,feature\na,one\n", "Line 2"),
        (b"list,feature\n,1\n", "cannot name a list"),
        (b"name,feature\na,1\n", "begins with “name,feature”"),
    ],
)
def test_files_that_hold_no_lists_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(NotesError, match=message):
        read_lists(content, D_SAE)


@pytest.fixture
def visit(planted_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a page of a copy of the planted dictionary, and gives the directory of the dictionary."""
    root = tmp_path / "runs"
    shutil.copytree(planted_root, root)
    (root / "demo" / "tm" / NAME).unlink(missing_ok=True)
    monkeypatch.setenv(ROOT_VARIABLE, str(root))

    def go(**params: str) -> AppTest:
        return run_page(**{"sae": "demo/tm", **params})

    return go, root / "demo" / "tm"


def test_a_link_to_a_list_shows_its_features_and_filters_add_up(visit: Any) -> None:
    go, directory = visit
    Lists(directory).merge({"DNA & co": [9, 0, 7], "other": [1]})
    page = go(list="DNA & co", sort="number")
    assert list(page.dataframe[0].value["feature"]) == [0, 7, 9]
    assert list(go(list="DNA & co", flag="dead").dataframe[0].value["feature"]) == [7]
    missing = go(list="gone")
    assert "There is no list “gone”" in html(missing)
    assert len(missing.dataframe[0].value) == D_SAE


def test_the_table_is_saved_as_a_list_which_is_renamed_and_deleted(visit: Any) -> None:
    go, directory = visit
    page = go(flag="dead")
    shown = sorted(page.dataframe[0].value["feature"])
    page.text_input(key="save-list-name").input("silent")
    next(button for button in page.button if button.label.startswith("Save ")).click().run()
    assert not page.exception, page.exception
    assert {name: sorted(features) for name, features in Lists(directory).all().items()} == {"silent": shown}
    page = go(list="silent")
    page.text_input(key="rename-silent").input("dead ones").run()
    assert list(Lists(directory).all()) == ["dead ones"]
    assert page.session_state["list"] == "dead ones"
    assert len(page.dataframe[0].value) == len(shown)
    page.button(key="delete-list").click().run()
    assert not page.exception, page.exception
    assert Lists(directory).all() == {}
    assert len(page.dataframe[0].value) == D_SAE


def test_a_feature_is_put_into_lists_and_taken_out(visit: Any) -> None:
    go, directory = visit
    Lists(directory).merge({"a": [3], "b": [3, 4]})
    page = go(view="Feature", feature="3")
    (box,) = [each for each in page.multiselect if each.label == "Lists with this feature"]
    assert box.value == ["a", "b"]
    Lists(directory).add("a", [8])  # another tab
    box.set_value(["b"]).run()
    assert not page.exception, page.exception
    assert Lists(directory).all() == {"a": [8], "b": [3, 4]}
    page.button(key="open-list-b").click().run()
    assert page.session_state["view"] == "features"
    assert sorted(page.dataframe[0].value["feature"]) == [3, 4]
