"""Heads: what each attention head scores, beside its controls, and where it looks in a text."""

from __future__ import annotations

import numpy as np
import streamlit as st

from browser import lens_results, live, state
from browser.components.grid import Cells, Column, draw_grid
from browser.lens_results import LensResult
from browser.live import LiveError, prompts
from browser.markup import explain, heading
from browser.state import Page
from browser.tokens import label, pieces
from browser.views import lens_parts
from browser.views.prompt_box import prompt_box

SMALLEST = 0.005
COPYING = (
    "A copying or eigenvalue score certifies nothing alone: heads with flat patterns reach 0.9. Read it beside "
    "prefix_matching and the ablations."
)


def show(page: Page) -> None:
    """Draws the scores of all heads of the model, and the pattern of one."""
    path = lens_results.find(page.entry, state.root()).get("heads")
    left, right = st.columns([0.5, 0.5], gap="medium")
    with left:
        if path is None:
            explain(
                "The lens heads has not been run on this model",
                "It scores every attention head (where it looks, what it writes, what breaks without it), each score "
                "beside its controls. Its result belongs below the directory that the app was started on:",
                lens_parts.model_command(page, "heads"),
            )
        else:
            result = lens_parts.read(path)
            if result is not None:
                _scores(result)
    with right:
        _pattern(page)


def _scores(result: LensResult) -> None:
    heading("Heads")
    found = lens_results.by_head(result)
    columns = [column for column in found.columns if column != "head"]
    config = {column: st.column_config.NumberColumn(format="%.2f") for column in columns}
    lens_parts.draw_table(found, ["head"], "heads-all", config)
    st.caption(COPYING)
    heading("One measure beside its controls")
    names = [*columns, *(name for name in result.measures if name not in columns)]
    lens_parts.draw_measure(result, lens_parts.measure_box(result, names, "measure"), "heads")
    _skip_trigrams(result)


def _skip_trigrams(result: LensResult) -> None:
    heads = result.labels.get("skip_trigrams")
    if not isinstance(heads, list) or not heads:
        return
    heading("Skip-trigrams of the first layer")
    rows = [{"head": f"L0.head.{number}", **each} for number, head in enumerate(heads) for each in head.get("best", [])]
    st.dataframe(rows, hide_index=True, key="heads-trigrams")
    forced = [{"head": f"L0.head.{n}", "forced": p["forced"]} for n, h in enumerate(heads) for p in h["forced_pairs"]]
    if forced:
        st.caption("Forced pairs: raised only because QK and OV meet in the source alone.")
        st.dataframe(forced, hide_index=True, key="heads-forced")


def _pattern(page: Page) -> None:
    heading("Where one head looks")
    if not page.entry.has_model:
        st.caption("The model of this dictionary cannot be run, so there is no pattern.")
        return
    try:
        loaded = live.load(page.entry)
        ids = prompts.encode(loaded, prompt_box(height=76))
        which, where = st.columns(2)
        layer = int(
            which.number_input("Layer", 0, max(1, loaded.model.n_layers - 1), 0, key="layer", bind="query-params")
        )
        pattern = np.asarray(prompts.patterns_of(loaded, ids, min(layer, loaded.model.n_layers - 1)))
    except LiveError as error:
        explain("The pattern cannot be shown", str(error))
        return
    head = int(where.number_input("Head", 0, max(1, len(pattern) - 1), 0, key="head", bind="query-params"))
    shown = pattern[min(head, len(pattern) - 1)]
    names = [label(loaded.model.tokenizer.decode([i]).encode()) for i in ids]
    rows, columns = np.nonzero(shown > SMALLEST)
    draw_grid(
        ids,
        pieces([name.encode() for name in names]),
        bars=[],
        columns=[Column(str(i), name) for i, name in enumerate(names)],
        cells=Cells(rows, columns, shown[rows, columns], np.ones(len(ids))),
        unit="weight",
        selected=None,
        key="heads-pattern",
        height=520,
    )
    st.caption(f"Each row reads from the columns: softmax(q · k / √d_head); weights above {SMALLEST} are shown.")
