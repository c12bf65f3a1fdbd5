"""Attention: where each head reads and which features make it, and what pushes the chosen feature's pre-activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st

from browser import live, state
from browser.components import Row, RowList, draw_lists
from browser.components.grid import Bars, Cells, Column, draw_grid
from browser.live import LiveError, circuits, prompts
from browser.markup import explain, facts
from browser.state import Page
from browser.tokens import label, pieces
from browser.views import attention_pairs
from browser.views.prompt_box import position_box, prompt_box

SHOWN = {
    "push": "Push on the feature, by head and source",
    "pattern": "Pattern of one head, every destination",
    "qk": "QK by feature",
}
HELP = {
    "facts": "pre-activation: the encoder's value before its activation function. It is the sum of what comes through "
    "the heads (Σ over heads and source tokens), what comes directly from the token itself, and the biases.",
    "exact": "Exact: with the attention pattern, the norm scales and the set of active ReLU neurons held fixed, the "
    "pre-activation is linear in the block's input. These parts plus the biases sum to the pre-activation.",
    "slope": "Gradient × input: the model's activation function is not piecewise linear, so its slope is used. Pattern "
    "and norm scales are held fixed. The parts do not sum to the pre-activation; the difference is in “biases and "
    "curvature”.",
    "pattern": "softmax(q · k / √d_head): how much the head reads at the row's token from the column's token.",
    "weight": "How much all heads together read from this token at the chosen one: Σ over heads of the pattern.",
}


def show(page: Page) -> None:
    """Draws the prompt, and one of: the paths into the chosen feature, a head's pattern, a head's scores by feature."""
    try:
        loaded = live.load(page.entry)
    except LiveError as error:
        explain("Attention needs the model", str(error))
        return
    prompt = prompt_box(height=76)
    try:
        ids = prompts.encode(loaded, prompt)
        shown, where = _settings(page, loaded, ids)
        {"push": _show_push, "pattern": _show_pattern, "qk": _show_pairs}[shown](page, loaded, ids, where)
    except LiveError as error:
        explain("Attention to this prompt cannot be shown", str(error))


@dataclass(frozen=True)
class Where:
    """A head, the token that reads, and the one that is read (None: the one that the head reads most)."""

    layer: int
    head: int
    at: int
    source: int | None


def _settings(page: Page, loaded: live.Live, ids: list[int]) -> tuple[str, Where]:
    shown = str(
        st.segmented_control(
            "Show",
            list(SHOWN),
            format_func=SHOWN.__getitem__,
            default="push",
            required=True,
            key="paths",
            bind="query-params",
            label_visibility="collapsed",
        )
    )
    boxes = st.columns([0.125, 0.125, 0.125, 0.125, 0.5])
    own = circuits.layer_of_entry(page.entry)
    usual = {"push": own, "pattern": own, "qk": circuits.first_reading_layer(page.entry)}[shown]
    last, last_head = loaded.model.n_layers - 1, loaded.model.n_heads - 1
    off = shown == "push"
    layer = boxes[0].number_input(
        "Layer", 0, max(1, last), None, key="layer", bind="query-params", disabled=off, placeholder=str(usual)
    )
    head = boxes[1].number_input("Head", 0, max(1, last_head), 0, key="head", bind="query-params", disabled=off)
    with boxes[2]:
        at = position_box(len(ids))
    source = boxes[3].number_input(
        "Source",
        0,
        max(1, len(ids) - 1),
        None,
        key="source",
        bind="query-params",
        disabled=shown != "qk",
        placeholder="most read",
        help="Position of the token that is read. Empty: the one that the head reads most, BOS aside.",
    )
    chosen = usual if layer is None or off else int(layer)
    return shown, Where(min(chosen, last), min(int(head), last_head), at, None if source is None else int(source))


def _show_push(page: Page, loaded: live.Live, ids: list[int], where: Where) -> None:
    """What pushes the chosen feature's pre-activation, by head and source token."""
    pattern = np.asarray(prompts.patterns(loaded, page.entry, ids))
    paths = prompts.paths(loaded, page.entry, ids, feature=page.feature, position=where.at)
    acts = prompts.activations(prompts.inspect(loaded, page.entry, ids), page.feature, len(ids))
    _facts(page, ids, paths, acts, where.at)
    left, right = st.columns([0.66, 0.34], gap="medium")
    with left:
        _pushes(page, ids, pattern, paths, acts, where.at)
    with right:
        _lists(page, ids, paths, where.at)


def _show_pattern(page: Page, loaded: live.Live, ids: list[int], where: Where) -> None:
    """Where one head of any layer reads, and what each head of it reads most at the chosen token."""
    pattern = np.asarray(prompts.patterns_of(loaded, ids, where.layer))
    left, right = st.columns([0.66, 0.34], gap="medium")
    with left:
        _pattern(page, ids, pattern[min(where.head, len(pattern) - 1)], where.at)
    with right:
        rows = []
        for head, weights in enumerate(pattern[:, where.at, : where.at + 1]):
            best = int(weights.argmax())
            name = label(page.index.token_bytes(ids[best]))
            rows.append(Row(name, f"{weights[best]:.2f}", float(weights[best]), f"head {head}", str(best), open=head))
        title = f"Read most at {where.at}, by the heads of layer {where.layer}"
        draw_lists([RowList(title, rows, HELP["pattern"])], key="pattern-heads", on_open=_choose_head)


def _show_pairs(page: Page, loaded: live.Live, ids: list[int], where: Where) -> None:
    pattern = np.asarray(prompts.patterns_of(loaded, ids, where.layer))[where.head]
    attention_pairs.show(page, loaded, ids, pattern, (where.layer, where.head, where.at, where.source))


def _choose_head(head: int) -> None:
    st.session_state["head"] = head


def _facts(page: Page, ids: list[int], paths: Any, acts: np.ndarray, at: int) -> None:
    values = {
        "fires on": state.token_label(page.index, page.feature),
        "at": f"{at} {label(page.index.token_bytes(ids[at]))}",
        "pre-activation": f"{paths.pre_act:+.3f}",
        "activation": f"{acts[at]:.3f}",
        "through heads": f"{float(paths.heads.sum()):+.3f}",
        "direct": f"{float(paths.direct.sum()):+.3f}",
        "biases" if paths.exact else "biases and curvature": f"{paths.rest:+.3f}",
    }
    st.html(facts(values, f"Into feature {page.feature:,}", help=HELP["facts"]))


def _pushes(page: Page, ids: list[int], pattern: np.ndarray, paths: Any, acts: np.ndarray, at: int) -> None:
    """Rows: source tokens. Columns: the direct path, then each head's OV circuit."""
    heads = np.asarray(paths.heads).sum(0).T  # [source, head]
    table = np.zeros((len(ids), 1 + heads.shape[1]))
    table[: at + 1, 1:] = heads
    table[at, 0] = float(paths.direct.sum())
    rows, columns = np.nonzero(table)
    looked = np.zeros(len(ids))
    looked[: at + 1] = pattern[:, at, : at + 1].sum(0)
    own = np.where(acts > 0, acts, np.nan)
    draw_grid(
        ids,
        pieces([page.index.token_bytes(i) for i in ids]),
        bars=[
            Bars("activation", own, f"Activation of feature {page.feature} on this token."),
            Bars("attention", looked, HELP["weight"]),
            Bars("push, all heads", table[:, 1:].sum(1), "Σ over heads of the push from this source token."),
        ],
        columns=[Column("direct"), *(Column(f"head {h}") for h in range(heads.shape[1]))],
        cells=Cells(rows, columns, table[rows, columns], np.full(table.shape[1], np.abs(table).max() or 1.0)),
        unit="push",
        floor=0.02,
        selected=at,
        key="attention",
        on_row=_choose,
        height=600,
    )
    st.caption(
        "Orange pushes the pre-activation up, blue down. Click a token to make it the destination.", help=_help(paths)
    )


def _help(paths: Any) -> str:
    return HELP["exact" if paths.exact else "slope"]


def _pattern(page: Page, ids: list[int], pattern: np.ndarray, at: int) -> None:
    shown = pieces([page.index.token_bytes(i) for i in ids])
    rows, columns = np.nonzero(pattern > 0.005)
    draw_grid(
        ids,
        shown,
        bars=[],
        columns=[Column(str(i), label(page.index.token_bytes(token))) for i, token in enumerate(ids)],
        cells=Cells(rows, columns, pattern[rows, columns], np.ones(len(ids))),
        unit="weight",
        selected=at,
        key="pattern",
        on_row=_choose,
        height=600,
    )
    st.caption("Each row reads from the columns; weights above 0.005 are shown.", help=HELP["pattern"])


def _choose(position: int) -> None:
    st.session_state["at"] = position


def _lists(page: Page, ids: list[int], paths: Any, at: int) -> None:
    heads, direct = np.asarray(paths.heads), np.asarray(paths.direct)
    how = "exact" if paths.exact else "gradient × input"
    found = [(f"direct: {part}", float(push), at) for part, push in zip(paths.parts, direct, strict=True)]
    found += [
        (f"head {h}: {part}", float(heads[p, h, s]), s)
        for p, part in enumerate(paths.parts)
        for h in range(heads.shape[1])
        for s in range(heads.shape[2])
    ]
    found.sort(key=lambda each: -abs(each[1]))
    most = max(abs(found[0][1]), 1e-9)
    rows = [
        Row(
            label(page.index.token_bytes(ids[source])),
            f"{push:+.3f}",
            abs(push) / most,
            name,
            prefix=str(source),
            negative=push < 0,
        )
        for name, push, source in found[:16]
    ]
    by_head = heads.sum((0, 2))
    largest = float(np.abs(by_head).max()) or 1.0
    order = np.argsort(-np.abs(by_head), kind="stable")
    head_rows = [
        Row(f"head {h}", f"{by_head[h]:+.3f}", abs(float(by_head[h])) / largest, negative=bool(by_head[h] < 0))
        for h in order.tolist()
    ]
    lists = [RowList(f"Strongest paths ({how})", rows, _help(paths)), RowList("By head, all sources", head_rows)]
    draw_lists(lists, key="paths-lists", on_open=None)
