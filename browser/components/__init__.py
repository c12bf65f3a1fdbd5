"""Two components drawn in the page's own DOM: coloured tokens, and short lists with bars.

Both take JSON and build nodes with `textContent`; no data ever reaches HTML, CSS or script text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from browser.data import Example
from browser.tokens import Piece

_HERE = Path(__file__).parent


def _source(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


_tokens = st.components.v2.component("monosem_tokens", css=_source("tokens.css"), js=_source("tokens.js"))
_lists = st.components.v2.component("monosem_lists", css=_source("lists.css"), js=_source("lists.js"))


@dataclass(frozen=True)
class Group:
    """Examples under one heading; `empty` is said where there are none."""

    title: str
    note: str
    examples: Sequence[Example]
    empty: str = "none"


@dataclass(frozen=True)
class Line:
    """A text on its own: the first `dim` tokens are context, those from `first` on differ."""

    token_ids: Sequence[int]
    shown: Sequence[Sequence[Piece]]
    dim: int = 0
    first: int | None = None


@dataclass(frozen=True)
class Row:
    """One row of a list: `share` in [0, 1] is the bar; `open` is the feature a click opens.

    `prefix` and `label` are kept apart, so that right-to-left text does not swap them.
    """

    label: str
    value: str
    share: float
    extra: str = ""
    prefix: str = ""
    negative: bool = False
    open: int | None = None


@dataclass(frozen=True)
class RowList:
    title: str
    rows: Sequence[Row]
    help: str = ""
    colour: str = ""
    empty: str = "none"


@dataclass
class _Vocabulary:
    """Distinct (token id, pieces) of a payload, so that text is sent once."""

    entries: list[tuple[int, list[Piece]]] = field(default_factory=list)
    numbers: dict[tuple[int, tuple[Piece, ...]], int] = field(default_factory=dict)

    def add(self, token_id: int, shown: Sequence[Piece]) -> int:
        key = (token_id, tuple(shown))
        if key not in self.numbers:
            self.numbers[key] = len(self.entries)
            self.entries.append((token_id, list(shown)))
        return self.numbers[key]


def draw_examples(groups: Sequence[Group], maximum: float, *, bos: int | None, key: str) -> None:
    """Groups of examples, orange in proportion to activation / `maximum`; `bos` ids are faint."""
    vocabulary = _Vocabulary()
    payload = [
        {
            "title": group.title,
            "note": group.note,
            "empty": group.empty,
            "examples": [_example(example, vocabulary) for example in group.examples],
        }
        for group in groups
    ]
    _tokens(data={"max": maximum, "bos": bos, "vocab": vocabulary.entries, "groups": payload}, key=key)


def draw_line(title: str, note: str, line: Line, *, key: str) -> None:
    """One text under a heading, with what differs from another text marked."""
    vocabulary = _Vocabulary()
    example = {
        "v": [vocabulary.add(i, s) for i, s in zip(line.token_ids, line.shown, strict=True)],
        "start": 0,
        "hit": -1,
        "plain": True,
        "dim": line.dim,
        "first": line.first,
    }
    group = {"title": title, "note": note, "empty": "", "examples": [example]}
    _tokens(data={"max": 1.0, "vocab": vocabulary.entries, "groups": [group]}, key=key)


def draw_lists(lists: Sequence[RowList], *, key: str, two: bool = False, on_open: Callable[[int], Any] | None) -> None:
    """Lists in one or `two` columns; a click on a row calls `on_open` with its feature."""

    def opened() -> None:
        feature = getattr(st.session_state.get(key), "open", None)
        if feature is not None and on_open is not None:
            on_open(int(feature))

    payload = [
        {
            "title": each.title,
            "help": each.help,
            "colour": each.colour,
            "empty": each.empty,
            "rows": [vars(row) for row in each.rows],
        }
        for each in lists
    ]
    _lists(data={"two": two, "lists": payload}, key=key, on_open_change=opened)


def _example(example: Example, vocabulary: _Vocabulary) -> dict[str, Any]:
    document, source, domain, _ = example.document
    entries = zip(example.token_ids.tolist(), example.shown, strict=True)
    return {
        "v": [vocabulary.add(token, shown) for token, shown in entries],
        "a": [float(a) for a in np.round(example.acts, 4)],
        "start": example.start,
        "hit": example.hit,
        "value": example.value,
        "where": domain,
        "doc": f"{document} · {source}" if source else document,
        "context": example.context,
    }
