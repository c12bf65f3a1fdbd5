"""QK by feature: which pairs of features (and other parts) make a head read one token rather than the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import streamlit as st

from browser import live, state
from browser.components import Row, RowList, draw_lists
from browser.components.grid import Bars, Cells, Column, draw_grid
from browser.lens_results import feature_named
from browser.live import circuits
from browser.markup import facts
from browser.state import Page
from browser.tokens import label
from browser.views import lens_parts

MOST_ROWS, MOST_COLUMNS, MOST_PAIRS = 16, 14, 16
HELP = {
    "facts": "score: q · k / √d_head at the source minus its mean at the other sources that the token can read (BOS "
    "aside): softmax ignores what all sources share. It is the sum over all pairs of a part of the query and a part of "
    "the key, the norms' scales held. features of the key: what features write into the key, heard by the whole query. "
    "features × features: pairs of features alone. random: what 95% of dictionaries with random directions of equal "
    "norm stay below in size.",
    "grid": "Rows: what the query at the reading token is made of. Columns: what the key at the source is made of, "
    "minus its mean over the other sources. Orange adds to the score, blue takes from it. Parts with the largest pairs "
    "are shown. A click opens a feature.",
    "pairs": "Query part → key part. The last number: 95% of pairs of random directions of equal norms are smaller; a "
    "pair below it is what any two directions give. error: what the dictionary leaves unexplained.",
    "sums": "Σ over the other side, by part.",
}


def show(
    page: Page, loaded: live.Live, ids: list[int], pattern: np.ndarray, place: tuple[int, int, int, int | None]
) -> None:
    """Draws the pairs of one head, and their sums. Raises LiveError where there is nothing to split."""
    layer, head, at, asked = place
    src = min(asked, at) if asked is not None else _most_read(page, ids, pattern[at, : at + 1])
    found = circuits.qk_pairs(loaded, page.entry, ids, layer, head, at, src)
    _facts(page, ids, found, pattern, place, src)
    pairs = np.asarray(found.pairs)
    rows = _largest(pairs, MOST_ROWS)
    columns = _largest(pairs.T, MOST_COLUMNS)
    left, right = st.columns([0.6, 0.4], gap="medium")
    with left:
        _grid(page, found, pairs, rows, columns)
    with right:
        _lists(page, found, pairs)


def _most_read(page: Page, ids: list[int], weights: np.ndarray) -> int:
    """The position that is read most; BOS, a resting place, only where there is nothing else."""
    seen = weights.copy()
    if len(seen) > 1 and ids[0] == page.index.attributes.get("bos"):
        seen[0] = -1.0
    return int(seen.argmax())


def _facts(
    page: Page, ids: list[int], found: Any, pattern: np.ndarray, place: tuple[int, int, int, int | None], src: int
) -> None:
    layer, head, at, _ = place
    name = [label(page.index.token_bytes(ids[i])) for i in (at, src)]
    values = {
        "at": f"{at} {name[0]}",
        "reads from": f"{src} {name[1]}",
        "attention": f"{pattern[at, src]:.3f}",
        "score above other sources": f"{found.score:+.3f}",
        "features of the key": _total(found.key_features),
        "features × features": _total(found.features),
    }
    st.html(facts(values, f"Head {layer}.{head}", help=HELP["facts"]))


def _total(total: Any) -> str:
    return f"{total.value:+.3f} (random ±{total.random_95:.3f})"


def _largest(pairs: np.ndarray, n: int) -> list[int]:
    return [int(i) for i in np.argsort(-np.abs(pairs).max(1), kind="stable")[:n]]


def _shown(page: Page, name: str) -> str:
    """A part's name; of a feature its number and what it fires on."""
    feature = feature_named(name)
    return name if feature is None else f"{feature} {state.token_label(page.index, feature)}"


def _grid(page: Page, found: Any, pairs: np.ndarray, rows: list[int], columns: list[int]) -> None:
    names = [_shown(page, found.queries[i]) for i in rows]
    here = pairs[np.ix_(rows, columns)]
    at, of = np.nonzero(here)
    features = [feature_named(found.queries[i]) for i in rows]

    def open_row(row: int) -> None:
        feature = features[row]
        if feature is not None:
            state.open_feature(feature)

    draw_grid(
        list(range(len(rows))),
        [[("text", name)] for name in names],
        bars=[Bars("Σ", pairs[rows].sum(1), HELP["sums"])],
        columns=[_column(page, found.keys[j]) for j in columns],
        cells=Cells(at, of, here[at, of], np.full(len(columns), np.abs(here).max() or 1.0)),
        unit="score",
        floor=0.02,
        selected=None,
        key="qk",
        on_row=open_row,
        on_column=state.open_feature,
        height=560,
        tokens=False,
    )
    st.caption(
        f"{len(rows)} of {len(found.queries):,} parts of the query × {len(columns)} of {len(found.keys):,} of the key.",
        help=HELP["grid"],
    )


def _column(page: Page, name: str) -> Column:
    feature = feature_named(name)
    return Column(name) if feature is None else Column(str(feature), state.token_label(page.index, feature), feature)


def _lists(page: Page, found: Any, pairs: np.ndarray) -> None:
    """The strongest pairs and the sums by part; a row opens the feature or head of its key, else of its query."""
    opens: list[Callable[[], None]] = []

    def row(value: float, most: float, *names: str, beside: str = "") -> Row:
        """`names`: the part of the query, if any, and that of the key."""
        nodes = [node for name in reversed(names) if (node := lens_parts.opener(name)) is not None]
        opens.extend(nodes[:1])
        return Row(
            " → ".join(_shown(page, name) for name in names),
            f"{value:+.3f}",
            abs(value) / most,
            beside,
            negative=value < 0,
            open=len(opens) - 1 if nodes else None,
        )

    most, chance = float(np.abs(pairs).max()) or 1.0, np.asarray(found.random_95)
    rows = []
    for place in np.argsort(-np.abs(pairs), axis=None, kind="stable")[:MOST_PAIRS]:
        i, j = np.unravel_index(place, pairs.shape)
        beside = "" if np.isnan(chance[i, j]) else f"random ±{chance[i, j]:.3f}"
        rows.append(row(float(pairs[i, j]), most, found.queries[i], found.keys[j], beside=beside))
    lists = [RowList("Strongest pairs: query → key", rows, HELP["pairs"])]
    for title, names, sums in (
        ("Of the key, by part", found.keys, pairs.sum(0)),
        ("Of the query, by part", found.queries, pairs.sum(1)),
    ):
        largest = float(np.abs(sums).max()) or 1.0
        best = np.argsort(-np.abs(sums), kind="stable")[:8].tolist()
        lists.append(RowList(title, [row(float(sums[n]), largest, names[n]) for n in best], HELP["sums"]))
    draw_lists(lists, key="qk-lists", on_open=lambda number: opens[number]())
