"""The page Streamlit runs: picks an SAE, a view and a feature, all of them in the URL.

One script and no `st.navigation`: with it, widgets bound to the URL lose their values.
"""

from __future__ import annotations

import streamlit as st

from browser import live, state, style
from browser.components.keys import draw_keys
from browser.data import SaeEntry
from browser.registry import DEFAULT, VIEWS
from browser.state import Page
from store.common import StoreError


def main() -> None:
    """One run of the page."""
    st.set_page_config(page_title="monosem", page_icon=style.icon(), layout="wide")
    st.html(style.CSS)
    root = state.root()
    entries = {entry.id: entry for entry in state.saes(root)}
    if not entries:
        st.html(BRAND)
        state.explain(
            "No dictionaries here",
            f"{root} holds no trained dictionary (a directory whose config.json says "
            '"kind": "sae") in its first four levels. Train one, or start the browser on '
            "another directory.",
            "sae train --acts runs/a/acts.zarr --recipe towards-monosemanticity --out runs/a/tm",
        )
        return
    entry, view, number = _top_bar(entries)
    draw_keys()
    page = Page(entry, number, entries)
    if entry.is_dump and not VIEWS[view].for_dumps:
        state.explain(
            f"{VIEWS[view].title} needs more than {entry.id} holds",
            "It was imported from another tool's feature pages: samples of the firings of each feature, without the "
            "dictionary's weights and without the firings that were not sampled. Features and Feature show what it "
            "has. Weights can be imported too (sae import), then indexed on your own text.",
        )
        return
    if VIEWS[view].needs_index:
        try:
            page = Page(entry, min(number, page.index.d_sae - 1), entries)
        except StoreError as error:
            _explain_index(entry, str(error))
            return
    VIEWS[view].show(page)
    live.warm(entry)
    state.spare_collections()


BRAND = '<div class="mono-brand">mono<i>sem</i></div>'


def _top_bar(entries: dict[str, SaeEntry]) -> tuple[SaeEntry, str, int]:
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small", key="bar")
    bar.html(BRAND, width="content")
    views = bar.container(width="content")
    ids = sorted(entries, key=lambda name: (not entries[name].has_index, name))
    chosen = bar.selectbox("Dictionary", ids, key="sae", bind="query-params", label_visibility="collapsed", width=250)
    entry = entries[str(chosen)]
    last = entry.d_sae - 1
    if st.session_state.get("feature", 0) > last:  # the dictionary before was larger
        st.session_state["feature"] = last
    feature_number = bar.number_input(
        "Feature",
        0,
        max(1, last),
        key="feature",
        bind="query-params",
        label_visibility="collapsed",
        on_change=state.leave_table,
        icon=":material/tag:",
        width=112,
    )
    # after the number: each change of the URL is a step of its history, and the step between
    # a row chosen in the table and its page must still be the table
    view = views.segmented_control(
        "View",
        list(VIEWS),
        format_func=lambda name: VIEWS[name].title,
        default=DEFAULT,
        required=True,
        key="view",
        bind="query-params",
        label_visibility="collapsed",
    )
    for text, by in (("Left", -1), ("Right", 1)):
        bar.button(
            "",
            icon=f":material/chevron_{text.lower()}:",
            key=f"go{text}",
            shortcut=text,
            help="Previous feature" if by < 0 else "Next feature",
            on_click=state.step_feature,
            args=(by, entry.d_sae),
        )
    return entry, str(view), int(feature_number)


def _explain_index(entry: SaeEntry, error: str) -> None:
    if entry.has_index:
        state.explain("This dictionary's index cannot be read", error, f"sae index {entry.path}")
        return
    if entry.unfinished:
        state.explain(
            f"{entry.id} is not trained yet",
            "The view Run shows how far it is. When training is over, evaluate it and build its index.",
            f"sae eval {entry.path} && sae index {entry.path}",
        )
        return
    state.explain(
        f"{entry.id} has no feature index yet",
        "The pages draw from an index of every activation of every feature. One command builds "
        "it, from the activation store the dictionary was trained on:",
        f"sae index {entry.path}",
    )


main()
