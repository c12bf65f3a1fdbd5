"""Notes in a dictionary's directory, and features exported as HTML and JSON."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser_fixture import DEAD, DENSE, HOSTILE, HOSTILE_TOKENS, build_index

from browser import export
from store.features import FeatureIndex
from store.notes import MAX_LABEL, NAME, Note, Notes, NotesError


def test_notes_are_kept_replaced_and_removed(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    assert notes.get(3) == Note(3)
    assert notes.all() == []
    assert not (tmp_path / NAME).exists()  # looking leaves nothing behind
    notes.put(Note(3, " base64 ", "fires on '; DROP TABLE notes; --", True))
    notes.put(Note(1, "x" * 999))
    again = Notes(tmp_path)
    assert (again.get(3).label, again.get(3).note, again.get(3).bookmarked) == (
        "base64",
        "fires on '; DROP TABLE notes; --",
        True,
    )
    assert [note.feature for note in again.all()] == [1, 3]
    assert len(again.get(1).label) == MAX_LABEL
    again.put(Note(3, "hex"))
    assert (notes.get(3).label, notes.get(3).bookmarked) == ("hex", False)
    notes.put(Note(3))
    assert [note.feature for note in notes.all()] == [1]
    assert json.loads(json.dumps(notes.export()))[0]["feature"] == 1


def test_damaged_notes_and_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no database, but long enough to look at" * 40)
    with pytest.raises(NotesError, match="not a database"):
        Notes(tmp_path).get(0)
    with pytest.raises(NotesError, match="not a database"):
        Notes(tmp_path).put(Note(0, "a"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / NAME).symlink_to(tmp_path / NAME)
    with pytest.raises(NotesError, match="is a link"):
        Notes(tmp_path / "elsewhere").put(Note(0, "a"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    path = tmp_path_factory.mktemp("index") / "features.zarr"
    build_index(path, d_sae=12, n_contexts=48)
    return FeatureIndex.open(path)


class Page(HTMLParser):
    """The tags of a page, their attributes, and the text of each example."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tokens: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._inside = tag == "span"
        if self._inside:
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, text: str) -> None:
        if self._inside:
            self.tokens[-1] += text


def test_hostile_tokens_are_text_in_an_exported_page(index: FeatureIndex) -> None:
    evil = "<script>alert(1)</script>"
    written = export.to_html(evil, [export.describe(index, HOSTILE, Note(HOSTILE, evil, evil))]).decode()
    page = Page(written)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "bdi", "small", "dl", "div"}
    assert page.tags <= allowed | {"dt", "dd", "span", "b"}
    assert page.attributes <= {"lang", "charset", "http-equiv", "content", "class", "dir", "style"}
    plain = {token for token in HOSTILE_TOKENS if token.isprintable()}
    assert plain <= set(page.tokens)
    assert "‹202e›evil" in page.tokens
    assert html.escape(evil) in written
    assert not re.search(
        r"(src|href)\s*=|url\(|@import", re.sub(r"<span.*?</span>|<dt>.*?</dt>|<bdi>.*?</bdi>", "", written)
    )


def test_exported_json_holds_what_the_index_holds(index: FeatureIndex) -> None:
    features = [export.describe(index, feature, Note(feature, "mine")) for feature in (DENSE, DEAD)]
    content = json.loads(export.to_json("demo", features))
    dense, dead = content["features"]
    rows, values = index.firings(DENSE)
    assert dense["statistics"]["count"] == len(rows)
    assert dense["label"] == "mine"
    top = dense["examples"][0]["texts"][0]
    assert max(top["activations"]) == pytest.approx(float(values.max()), rel=1e-4)
    for text in dense["examples"][3]["texts"]:
        first = text["context"] * index.seq_len + text["start"]
        place = np.searchsorted(rows, np.arange(first, first + len(text["token_ids"])))
        here = rows[np.minimum(place, len(rows) - 1)] == np.arange(first, first + len(text["token_ids"]))
        expected = np.where(here, values[np.minimum(place, len(rows) - 1)], 0)
        np.testing.assert_allclose(text["activations"], expected, atol=1e-5)
        assert len(text["tokens"]) == len(text["token_ids"]) == len(text["activations"])
    assert dead["examples"] == []
    assert dead["statistics"]["count"] == 0
