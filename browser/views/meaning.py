"""The box that ranks the features by meaning."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import streamlit as st

from browser.catalogue import by_similarity
from browser.live import LiveError, search
from browser.markup import explain
from browser.state import Page
from store.notes import NotesError

INSTALL = "pip install 'monosem[search]'"
HELP = (
    "The features closest in meaning to your text. A feature has two texts: your label and note; and the domain and "
    "the tokens that it fires on, in words. Similarity = the larger cosine of the two with your text, by a small text "
    "model of English. Compare it with the median below the box. Search, above, looks for exact words."
)


def rank(page: Page, shown: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Draws the box; returns the rows of the table, most similar first if something is asked, and whether it is."""
    installed = search.is_installed()
    text = st.text_input(
        "Search by meaning",
        key="meaning",
        bind="query-params",
        disabled=not installed,
        placeholder="names of months" if installed else f"needs the extra search: {INSTALL}, then start again",
        help=HELP,
        max_chars=300,
    )
    if not (text or "").strip():  # without the extra, a link may still hold a text
        return shown, False
    place = st.empty()
    try:
        with st.spinner("Loading the text model …"):
            found = search.similarities(page.index, page.entry.path, str(text), _reporting_at(place.progress))
    except (LiveError, NotesError) as error:
        explain("The features cannot be searched by meaning", str(error))
        return shown, False
    finally:
        place.empty()
    middle, known = search.median(found), int(np.isfinite(found).sum())
    said = "–" if middle is None else f"{middle:.2f}"
    st.caption(
        f"Similarity of the median feature to this text: {said}. {known:,} of {len(found):,} features have a text; the "
        "others are left out."
    )
    return by_similarity(shown, found), True


def _reporting_at(draw: Callable[[float, str], object]) -> Callable[[int, int], None]:
    """Draws how many texts are embedded, which takes long only the first time."""

    def report(done: int, total: int) -> None:
        draw(done / total, f"Reading the features' texts, once for this dictionary: {done:,} of {total:,}")

    return report
