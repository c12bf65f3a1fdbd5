"""Components of the pages: coloured tokens, lists with bars, histograms that can be dragged over.

All take JSON and set `textContent`, so that no data becomes HTML, CSS or script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from browser.components.base import Vocabulary, declare, on_trigger
from browser.data import Example
from browser.live.ablation import Effects
from browser.tokens import Piece

_tokens, _lists, _effects, _histograms = map(declare, ("tokens", "lists", "effects", "histograms"))


@dataclass(frozen=True)
class Group:
    """Examples under one heading; `empty` is the text shown without examples."""

    title: str
    note: str
    examples: Sequence[Example]
    empty: str = "none"


@dataclass(frozen=True)
class Line:
    """One text: its first `dim` tokens are the prompt, drawn dim; those from `first` on differ from another text."""

    token_ids: Sequence[int]
    shown: Sequence[Sequence[Piece]]
    dim: int = 0
    first: int | None = None


@dataclass(frozen=True)
class Row:
    """One row of a list: `share` in [0, 1] is the bar, `open` the feature that a click opens, `add` draws a + button.

    `prefix` and `label` are separate, so that right-to-left text does not swap them.
    """

    label: str
    value: str
    share: float
    extra: str = ""
    prefix: str = ""
    negative: bool = False
    open: int | None = None
    add: bool = False


@dataclass(frozen=True)
class RowList:
    title: str
    rows: Sequence[Row]
    help: str = ""
    colour: str = ""
    empty: str = "none"


@dataclass(frozen=True)
class Histogram:
    """Bars (low, high, count) under a heading; `which` names it when a range is dragged, `chosen` is that range."""

    which: str
    title: str
    bars: Sequence[tuple[float, float, int]]
    counted: str
    help: str = ""
    log: bool = False
    split: bool = False
    chosen: tuple[float, float] | None = None


def draw_examples(groups: Sequence[Group], maximum: float, *, bos: int | None, key: str, effects_key: str = "") -> None:
    """Draws groups of examples, orange by activation / `maximum`; tokens with the id `bos` are faint.

    `draw_effects` with the same `effects_key` underlines them later.
    """
    vocabulary, pictures = Vocabulary(), dict[str, int]()  # a data URL is sent once, and named by its number
    payload = [
        {
            "title": group.title,
            "note": group.note,
            "empty": group.empty,
            "examples": [_example(example, vocabulary) | _picture(example, pictures) for example in group.examples],
        }
        for group in groups
    ]
    data = {"key": effects_key, "max": maximum, "bos": bos, "vocab": vocabulary.entries, "groups": payload}
    _tokens(data=data | {"pictures": list(pictures)}, key=key)


def draw_effects(
    groups: Sequence[Group], effects: Effects, show: Callable[[int], list[Piece]], *, effects_key: str
) -> None:
    """Underlines the tokens of `groups` by their ablation effects; `show` gives the text of a token id."""
    vocabulary = Vocabulary()
    examples: dict[str, dict[str, list[Any]]] = {}
    largest = 0.0

    def moved(changes: list[tuple[int, float]]) -> list[tuple[int, float]]:
        return [(vocabulary.add(token, show(token)), round(change, 4)) for token, change in changes]

    for g, group in enumerate(groups):
        for e, example in enumerate(group.examples):
            found: dict[str, list[Any]] = {name: [] for name in ("i", "d", "p", "q", "up", "down")}
            for i in range(len(example.token_ids)):
                effect = effects.at.get((example.context, example.start + i))
                if effect is None:
                    continue
                largest = max(largest, abs(effect.change))
                found["i"].append(i)
                found["d"].append(_rounded(effect.change))
                losses = (None, None) if effect.loss is None else (effect.loss, effect.loss + effect.change)
                for name, loss in zip("pq", losses, strict=True):
                    found[name].append(None if loss is None else _rounded(math.exp(-loss)))
                found["up"].append(moved(effect.raised))
                found["down"].append(moved(effect.lowered))
            if found["i"]:
                examples[f"{g},{e}"] = found
    _effects(
        data={"key": effects_key, "scale": largest or 1.0, "vocab": vocabulary.entries, "examples": examples},
        key="effects",
    )


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def draw_histograms(charts: Sequence[Histogram], *, key: str, on_range: Callable[[str, Any, Any], None]) -> None:
    """Draws histograms; a drag calls `on_range(which, low, high)`, a click calls it with None for both bounds."""

    def dragged(chosen: dict[str, Any]) -> None:
        on_range(str(chosen["which"]), chosen["low"], chosen["high"])

    payload = [
        {
            **{name: value for name, value in vars(chart).items() if name != "chosen"},
            "low": chart.chosen[0] if chart.chosen else None,
            "high": chart.chosen[1] if chart.chosen else None,
        }
        for chart in charts
    ]
    _histograms(data={"charts": payload}, key=key, on_range_change=on_trigger(key, "range", dragged))


def draw_line(title: str, note: str, line: Line, *, key: str) -> None:
    """Draws one text under a heading, and marks what differs from another text."""
    vocabulary = Vocabulary()
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


def draw_lists(
    lists: Sequence[RowList],
    *,
    key: str,
    two: bool = False,
    on_open: Callable[[int], Any] | None,
    on_add: Callable[[int], Any] | None = None,
) -> None:
    """Draws lists in one or `two` columns; a click on a row calls `on_open` with its feature, one on its + `on_add`."""

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
    _lists(
        data={"two": two, "lists": payload},
        key=key,
        on_open_change=on_trigger(key, "open", on_open),
        on_add_change=on_trigger(key, "add", on_add),
    )


def _example(example: Example, vocabulary: Vocabulary) -> dict[str, Any]:
    document = example.document
    entries = zip(example.token_ids.tolist(), example.shown, strict=True)
    return {
        "v": [vocabulary.add(token, shown) for token, shown in entries],
        "a": [round(a, 4) for a in example.acts.tolist()],
        "start": example.start,
        "hit": example.hit,
        "value": example.value,
        "where": document.domain,
        "doc": f"{document.id} · {document.source}" if document.source else document.id,
        "context": example.context,
        "row": example.row_name,
    }


def _picture(example: Example, pictures: dict[str, int]) -> dict[str, Any]:
    picture = example.picture
    if picture is None:
        return {}
    number = pictures.setdefault(picture.url, len(pictures))
    return {"picture": number, "grid": picture.grid, "leading": picture.leading}
