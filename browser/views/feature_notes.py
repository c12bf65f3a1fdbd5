"""Your own label, note, bookmark and lists of a feature, and its export."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import streamlit as st

from browser import export, state
from browser.markup import explain
from browser.state import Page
from browser.tokens import plain_markdown
from browser.views import named_lists
from browser.views.download import download
from store.notes import MAX_LABEL, MAX_NOTE, Note, Notes, NotesError


def show(page: Page, provenance: str) -> None:
    """Four menus: label and note, bookmarks, lists, export."""
    notes = Notes(page.entry.path)
    try:
        note, everything = notes.get(page.feature), notes.all()
    except NotesError as error:
        explain("The notes cannot be read", str(error))
        return
    bar = st.container(horizontal=True, gap="small", key="notes")
    with (
        bar.popover(plain_markdown(note.label) or "Add a label", icon=":material/edit:"),
        st.form("note", border=False),
    ):
        label = st.text_input("Label", note.label, max_chars=MAX_LABEL, key=f"label-{page.feature}")
        text = st.text_area("Note", note.note, max_chars=MAX_NOTE, key=f"note-{page.feature}")
        if st.form_submit_button("Save", type="primary"):
            _save(notes, Note(page.feature, label or "", text or "", note.bookmarked))
    marked = [each for each in everything if each.bookmarked]
    star = ":material/bookmark_added:" if note.bookmarked else ":material/bookmark_add:"
    title = "Bookmarked" if note.bookmarked else "Bookmark"
    if bar.button(title, icon=star, key="bookmark"):
        _save(notes, Note(page.feature, note.label, note.note, not note.bookmarked))
    with bar.popover(f"Bookmarks ({len(marked)})", icon=":material/bookmarks:"):
        for each in marked[:50]:
            name = f"{each.feature:,}  {each.label}"
            st.button(plain_markdown(name), key=f"go-{each.feature}", on_click=state.open_feature, args=(each.feature,))
        if not marked:
            st.caption("No bookmarks yet.")
    named_lists.feature_menu(bar, page)
    with bar.popover("Export", icon=":material/download:"):
        _downloads(page, provenance, notes, "this feature", [page.feature])
        if marked:
            numbers = [each.feature for each in marked][: export.MAX_FEATURES]
            _downloads(page, provenance, notes, "all bookmarks", numbers)
        if everything:
            download(
                "Labels, notes and bookmarks as JSON",
                "notes.json",
                "application/json",
                lambda: json.dumps(notes.export(), ensure_ascii=False, indent=1).encode(),
            )


def _downloads(page: Page, provenance: str, notes: Notes, what: str, numbers: list[int]) -> None:
    def written(write: Callable[[str, list[dict[str, Any]]], bytes]) -> bytes:
        return write(provenance, [export.describe(page.index, number, notes.get(number)) for number in numbers])

    name = f"features-{page.entry.id.replace('/', '-')}-{numbers[0]}"
    for kind, mime, write in (("HTML", "text/html", export.to_html), ("JSON", "application/json", export.to_json)):
        download(f"{kind}: {what}", f"{name}.{kind.lower()}", mime, partial(written, write))


def _save(notes: Notes, note: Note) -> None:
    try:
        notes.put(note)
    except NotesError as error:
        explain("The note could not be saved", str(error))
        return
    st.rerun()
