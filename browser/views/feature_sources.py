"""Which source tokens and heads push a feature of head outputs (hook_z) in its strongest examples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import streamlit as st

from browser import data, live
from browser.components import Group, Row, RowList, draw_examples, draw_lists
from browser.live import LiveError, prompts
from browser.state import Page
from browser.tokens import plain_markdown

N_EXAMPLES = 8
HELP = (
    "The pre-activation at the marked token is Σ over heads and source tokens of pattern · (value · W_enc), plus a "
    "constant: exact with the attention pattern held at its value. Orange: what all heads together push from this "
    "source token, / the largest push; tokens that push down are not coloured. The page Attention shows single heads. "
    "Source: Kissane et al. 2024, direct feature attribution."
)


def applies(page: Page) -> bool:
    """Whether the dictionary reads the outputs of attention heads."""
    return str(page.index.attributes.get("hook_point", "")).endswith(".attn.hook_z")


def show(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    """Draws the strongest examples, coloured by source token, and the pushes by head and by distance."""
    index = page.index
    best = data.top_rows(rows, values, N_EXAMPLES, index.seq_len)
    examples = data.examples(index, rows, values, best, before=1 << 20, after=0)
    try:
        loaded = live.load(page.entry)
        found = [_pushes(page, loaded, example) for example in examples]
    except LiveError as error:
        st.caption(plain_markdown(f"Sources cannot be shown: {error}"))
        return
    by_source = [pushes.sum(0) for pushes in found]
    largest = max(float(pushes.max()) for pushes in by_source)
    shown = [
        replace(example, acts=np.maximum(pushes, 0).astype(np.float32))
        for example, pushes in zip(examples, by_source, strict=True)
    ]
    st.caption("Orange: push from this source token on the last token.", help=HELP)
    group = Group("By source token", f"{len(shown)} strongest examples", shown)
    draw_examples([group], max(largest, 1e-9), bos=index.attributes.get("bos"), key="sources")
    _lists(found)


def _pushes(page: Page, loaded: live.Live, example: data.Example) -> np.ndarray:
    """Push [head, source] on the pre-activation at the example's last token."""
    ids = [int(token) for token in example.token_ids]
    found = prompts.paths(loaded, page.entry, ids, feature=page.feature, position=len(ids) - 1)
    heads: np.ndarray = np.asarray(found.heads)[0]
    return heads


def _lists(found: list[np.ndarray]) -> None:
    """Mean push by head, and by how many tokens back the source is, over the examples."""
    by_head = np.mean([pushes.sum(1) for pushes in found], axis=0)
    back = np.zeros(max(pushes.shape[1] for pushes in found))
    for pushes in found:
        back[: pushes.shape[1]] += pushes.sum(0)[::-1] / len(found)
    most = max(float(np.abs(by_head).max()), 1e-9), max(float(np.abs(back).max()), 1e-9)
    names = ["the token itself", "1 token back", *(f"{n} tokens back" for n in range(2, len(back)))]
    lists = [
        RowList("Push by head, mean", _rows([f"head {h}" for h in range(len(by_head))], by_head, most[0]), HELP),
        RowList("Push by distance, mean", _rows(names, back, most[1]), HELP),
    ]
    draw_lists(lists, key="source-lists", two=True, on_open=None)


def _rows(names: list[str], values: np.ndarray, most: float) -> list[Row]:
    order = np.argsort(-np.abs(values), kind="stable")[:10].tolist()
    return [
        Row(names[i], f"{values[i]:+.3f}", abs(float(values[i])) / most, negative=bool(values[i] < 0)) for i in order
    ]
