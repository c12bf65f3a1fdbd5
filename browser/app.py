"""The page Streamlit runs: the start page, or a view of one dictionary and feature; the URL holds all of it.

One script and no `st.navigation`: with it, widgets bound to the URL lose their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from browser import address, live, state, style
from browser.address import Missing
from browser.components.keys import draw_keys
from browser.data import SaeEntry
from browser.markup import BRAND, explain
from browser.registry import DEFAULT, VIEWS
from browser.state import Page
from browser.views import start
from store.common import StoreError

TITLES = {name: view.title for name, view in VIEWS.items()}


def main() -> None:
    """One run of the page."""
    st.set_page_config(page_title="monosem", page_icon=style.icon(), layout="wide")
    st.html(style.CSS)
    root = state.root()
    entries = {entry.id: entry for entry in state.saes(root)}
    if not entries:
        st.html(BRAND)
        _explain_empty(root)
        return
    ids = sorted(entries, key=lambda name: (not entries[name].has_index, name))
    missing = _missing(entries, ids[0])
    if missing is not None:
        st.html(BRAND)
        explain(missing.title, missing.text, links=missing.links)
        if not missing.links:  # the dictionary itself is missing
            start.show(root, entries, in_place=False)
        return
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small", key="bar")
    bar.html(BRAND, width="content")
    views = bar.container(width="content")
    chosen = _choose_dictionary(bar, ids)
    draw_keys()
    if chosen is None:
        start.show(root, entries)
    else:
        entry = entries[chosen]
        view, feature = _choose_view(bar, views, entry)
        _show(view, Page(entry, feature, entries))
        live.warm(entry)
    state.freeze_garbage_collection()


def _explain_empty(root: Path) -> None:
    explain(
        "No runs here yet",
        f"{root} and the four levels of directories below it hold no dictionary (a directory whose config.json says "
        '"kind": "sae"). Make one as below, or start the browser on another directory (sae browse DIRECTORY).',
        "sae harvest --model tiny-relu-1l --text default --out runs/a/acts.zarr\n"
        "sae train --acts runs/a/acts.zarr --out runs/a/sae\nsae eval runs/a/sae\nsae index runs/a/sae",
    )


def _missing(entries: Mapping[str, SaeEntry], first: str) -> Missing | None:
    """The part of this session's link that does not exist; widgets bound to the URL would replace it silently."""
    asked, chosen = st.query_params, st.session_state
    name = asked.get("sae", first)
    if "sae" in asked and "sae" not in chosen:
        missing = address.missing_dictionary(name, entries)
        if missing is not None:
            return missing
    if name not in entries:
        return None
    view = DEFAULT
    if "view" in asked and "view" not in chosen:
        found = address.view_named(asked["view"], TITLES)
        if found is None:
            place = {"sae": name} | {key: asked[key] for key in ("feature",) if key in asked}
            return address.missing_view(asked["view"], TITLES.values(), place)
        view = found
        if asked["view"] != TITLES[view]:  # the widget reads titles only
            chosen["view"] = view
    if "feature" in asked and "feature" not in chosen:
        return address.missing_feature(asked["feature"], entries[name], TITLES[view])
    return None


def _choose_dictionary(bar: DeltaGenerator, ids: list[str]) -> str | None:
    """The chosen dictionary; None on the start page."""
    # Links of version 0.1 do not name the first dictionary: for a session that began with one it is the default.
    from_link = st.session_state.setdefault("from_link", bool(st.query_params) and "sae" not in st.query_params)
    return bar.selectbox(
        "Dictionary",
        ids,
        index=0 if from_link else None,
        key="sae",
        bind="query-params",
        placeholder="Choose a dictionary",
        label_visibility="collapsed",
        width=220,
    )


def _choose_view(bar: DeltaGenerator, views: DeltaGenerator, entry: SaeEntry) -> tuple[str, int]:
    """The chosen view and feature."""
    last = entry.d_sae - 1
    if st.session_state.get("feature", 0) > last:  # the dictionary before was larger
        st.session_state["feature"] = last
    feature = bar.number_input(
        "Feature",
        0,
        max(1, last),
        key="feature",
        bind="query-params",
        label_visibility="collapsed",
        on_change=state.feature_changed,
        icon=":material/tag:",
        width=112,
    )
    # Created after the number: every change of the URL becomes a step of the browser's history, and going back from a
    # row that was opened in the table must lead to the table.
    view = views.segmented_control(
        "View",
        list(VIEWS),
        format_func=TITLES.__getitem__,
        default=DEFAULT,
        required=True,
        key="view",
        bind="query-params",
        label_visibility="collapsed",
    )
    for key, by, help_ in (("Left", -1, "Previous feature"), ("Right", 1, "Next feature")):
        bar.button(
            "",
            icon=f":material/chevron_{key.lower()}:",
            key=f"go{key}",
            shortcut=key,
            help=help_,
            on_click=state.step_feature,
            args=(by, entry.d_sae),
        )
    return str(view), int(feature)


def _show(view: str, page: Page) -> None:
    """Draws the view, or says what the dictionary lacks for it."""
    entry = page.entry
    if entry.is_dump and not VIEWS[view].for_dumps:
        explain(
            f"{VIEWS[view].title} needs more than {entry.id} has",
            "It was imported from another tool's feature pages: samples of each feature's activations, without the "
            "dictionary's weights. Features and Feature show what it has. The weights can be imported too (sae import) "
            "and then indexed on your own text.",
        )
        return
    if VIEWS[view].needs_model and not entry.has_model:
        explain(
            f"{VIEWS[view].title} runs the model, and {entry.id} has none",
            "It was trained on activations that came as arrays (sae harvest --from). The other views show what they "
            "say: which rows each feature fires on, and how the dictionary was trained and measured.",
        )
        return
    if VIEWS[view].needs_index:
        try:
            last = page.index.d_sae - 1
        except StoreError as error:
            _explain_index(entry, str(error))
            return
        page = Page(entry, min(page.feature, last), page.entries)
    VIEWS[view].show(page)


def _explain_index(entry: SaeEntry, error: str) -> None:
    if entry.has_index:
        explain("This dictionary's index cannot be read", error, f"sae index {entry.path}")
        return
    if entry.is_crosscoder:
        explain(
            f"{entry.id} is a crosscoder",
            "Its rows join several hook points or models, and a feature index describes those of one. The view Run "
            "shows its training, its evaluation at each site and where its features are, once it is evaluated:",
            f"sae eval {entry.path}",
        )
        return
    if entry.unfinished:
        explain(
            f"{entry.id} is not trained yet",
            "The view Run shows its progress. After training, evaluate it and build its index:",
            f"sae eval {entry.path} && sae index {entry.path}",
        )
        return
    explain(
        f"{entry.id} has no feature index yet",
        "Feature pages are drawn from an index of every activation of every feature. One command builds it, from the "
        "activation store that the dictionary was trained on:",
        f"sae index {entry.path}",
    )


main()
