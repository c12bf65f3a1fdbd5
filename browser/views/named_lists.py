"""The named lists in the views: a feature's lists, the list that filters the table, and what is done with lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from browser import named_lists
from browser.markup import explain
from browser.named_lists import MAX_NAME, Lists, read_lists
from browser.state import Page
from browser.tokens import plain_markdown
from browser.views.download import download
from store.notes import NotesError

CHOSEN = "list"  # the chosen list, in the session and in the address
_FAILED = "list-failed"


def lists_of(page: Page) -> dict[str, list[int]]:
    """The lists of the page's dictionary; says so on the page if they cannot be read."""
    try:
        return Lists(page.entry.path).all()
    except NotesError as error:
        explain("The lists cannot be read", str(error))
        return {}


def feature_menu(bar: DeltaGenerator, page: Page) -> None:
    """A menu with the lists that hold the feature; others are chosen, and new ones are typed."""
    lists = lists_of(page)
    held = [name for name, features in lists.items() if page.feature in features]
    with bar.popover("Lists", icon=":material/list:"):
        key = f"lists-{page.feature}-{held}"  # another tab's change makes another widget
        st.multiselect(
            "Lists with this feature",
            list(lists),
            held,
            key=key,
            accept_new_options=True,
            placeholder="Choose a list, or type a new name",
            on_change=_change_lists,
            args=(page, held, key),
        )
        for name in held:
            label = plain_markdown(f"{name} ({len(lists[name]):,})")
            st.button(label, key=f"open-list-{name}", on_click=_open, args=(name,))
    _say_failure()


def _change_lists(page: Page, held: Sequence[str], key: str) -> None:
    wanted = st.session_state[key]
    lists = Lists(page.entry.path)
    for name in wanted:
        if name not in held:
            _attempt(partial(lists.add, name, [page.feature]))
    for name in held:
        if name not in wanted:
            _attempt(partial(lists.remove, name, [page.feature]))


def _open(name: str) -> None:
    st.session_state[CHOSEN] = name
    st.session_state["view"] = "features"


def choose(place: DeltaGenerator, lists: Mapping[str, Sequence[int]]) -> str | None:
    """Draws the box for the list that filters the table; returns its name."""
    if CHOSEN in st.session_state:
        if st.session_state[CHOSEN] not in lists:  # renamed or deleted
            st.session_state[CHOSEN] = None
    elif CHOSEN in st.query_params and st.query_params[CHOSEN] not in lists:
        there = ", ".join(lists) or "none yet"
        explain(
            f"There is no list “{st.query_params[CHOSEN]}” for this dictionary",
            f"It may have been renamed or deleted; all features are shown. Lists: {there}.",
        )
    return place.selectbox(
        "List",
        list(lists),
        index=None,
        key=CHOSEN,
        bind="query-params",
        placeholder="all features",
        help="Only the features of one of your lists. Make lists below the table, or under Lists on a feature's page.",
    )


def manage(place: DeltaGenerator, page: Page, lists: Mapping[str, Sequence[int]], shown: pd.DataFrame) -> None:
    """A menu below the table: save what it shows as a list, rename, delete, export and import lists."""
    chosen = st.session_state.get(CHOSEN)
    with place.popover("Lists", icon=":material/list:", width="stretch"):
        with st.form("save-list", border=False, clear_on_submit=True):
            name = st.text_input("Save the features shown as", max_chars=MAX_NAME, key="save-list-name")
            st.caption("A list of that name that exists keeps its features; these are added.")
            saved = st.form_submit_button(f"Save {len(shown):,} features")
        if saved and _attempt(lambda: Lists(page.entry.path).add(name or "", map(int, shown["feature"]))):
            st.rerun()
        if chosen is not None:
            _change_chosen(page, chosen)
        if lists:
            stem = f"lists-{page.entry.id.replace('/', '-')}"
            for kind, mime, write in (
                ("JSON", "application/json", named_lists.to_json),
                ("CSV", "text/csv", named_lists.to_csv),
            ):
                download(f"All lists as {kind}", f"{stem}.{kind.lower()}", mime, partial(write, lists))
        with st.form("import-lists", border=False, clear_on_submit=True):
            file = st.file_uploader("Import lists", ["json", "csv"], key="lists-file")
            imported = st.form_submit_button("Import")
        if imported and file is not None:
            content = file.getvalue()
            if _attempt(lambda: Lists(page.entry.path).merge(read_lists(content, page.index.d_sae))):
                st.rerun()
    _say_failure()


def _change_chosen(page: Page, chosen: str) -> None:
    lists, key = Lists(page.entry.path), f"rename-{chosen}"

    def rename() -> None:
        new = st.session_state[key]
        if _attempt(lambda: lists.rename(chosen, new)):
            st.session_state[CHOSEN] = new.strip()

    def delete() -> None:
        if _attempt(lambda: lists.delete(chosen)):
            st.session_state[CHOSEN] = None

    st.text_input("Name of this list", chosen, max_chars=MAX_NAME, key=key, on_change=rename)
    st.button("Delete this list", icon=":material/delete:", key="delete-list", on_click=delete)


def _attempt(change: Callable[[], Any]) -> bool:
    """Whether the change was made; if not, the reason is shown by `_say_failure`."""
    try:
        change()
    except NotesError as error:
        st.session_state[_FAILED] = str(error)
        return False
    return True


def _say_failure() -> None:
    reason = st.session_state.pop(_FAILED, "")
    if reason:
        explain("The lists were not changed", reason)
