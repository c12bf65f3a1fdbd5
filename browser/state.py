"""What the views share: the root, cached handles, and moving between views.

State lives in widgets bound to the URL; a move sets their session keys inside a callback.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

from browser import catalogue, comparison, data, runs
from browser.comparison import Comparison
from browser.data import SaeEntry
from browser.notes import Notes, NotesError
from browser.tokens import label
from store.common import StoreError
from store.features import FeatureIndex

ROOT_VARIABLE = "MONOSEM_ROOT"
EDITS = "edits"  # the steering set, as text


@dataclass(frozen=True)
class Page:
    """What a view draws: a dictionary, the chosen feature, and every dictionary below the root."""

    entry: SaeEntry
    feature: int
    entries: Mapping[str, SaeEntry]

    @cached_property
    def index(self) -> FeatureIndex:
        """The dictionary's feature index. Raises StoreError where there is none."""
        return open_index(self.entry)


def root() -> Path:
    """The runs directory the app was started on."""
    return Path(os.environ.get(ROOT_VARIABLE, "runs")).resolve()


@st.cache_resource(ttl=5, show_spinner=False)
def saes(folder: Path) -> list[SaeEntry]:
    """SAEs below `folder`, looked for again after five seconds."""
    return data.scan(folder)


@st.cache_resource(ttl=5, show_spinner="Reading the runs …")
def summaries(folder: Path) -> list[runs.Summary]:
    """What the start page says about each of `saes(folder)`, read again after five seconds."""
    return [runs.summary(entry) for entry in saes(folder)]


@st.cache_resource(show_spinner=False)
def spare_collections() -> None:
    """Once, after the first page: what is loaded by then stays, and the collector need not look through it again.

    Each of its full rounds would hold a page up for a tenth of a second.
    """
    gc.collect()
    gc.freeze()


def open_index(entry: SaeEntry) -> FeatureIndex:
    """The entry's index, opened once and again when it was rebuilt. Raises StoreError."""
    return _open_index(entry.index_path, _stamp(entry.index_path))


@st.cache_resource(max_entries=8, show_spinner=False)
def _open_index(path: Path, stamp: int) -> FeatureIndex:
    return FeatureIndex.open(path)


def table_of(page: Page) -> pd.DataFrame:
    """`catalogue.feature_table` of the page's index, made once; callers must not change it."""
    table = _feature_table(page.index, page.index.path, _stamp(page.index.path))
    try:
        said = {note.feature: note.label for note in Notes(page.entry.path).all() if note.label}
    except NotesError:  # the feature's page says what is the matter
        said = {}
    if not said:
        return table
    table = table.copy(deep=False)
    table.insert(1, "label", [said.get(feature, "") for feature in table["feature"].tolist()])
    return table


@st.cache_resource(max_entries=4, show_spinner="Reading the dictionary …")
def _feature_table(_index: FeatureIndex, path: Path, stamp: int) -> pd.DataFrame:
    return catalogue.feature_table(_index)


def panel_of(page: Page, name: str) -> np.ndarray:
    """A whole panel of the page's index, read once; callers must not change it."""
    return _panel(page.index, page.index.path, _stamp(page.index.path), name)


@st.cache_resource(max_entries=16, show_spinner=False)
def _panel(_index: FeatureIndex, path: Path, stamp: int, name: str) -> np.ndarray:
    return _index.column(name)


def _stamp(path: Path) -> int:
    """When the index at `path` was made; a rebuilt one has another."""
    try:
        return (path / "zarr.json").stat().st_mtime_ns
    except OSError as error:
        raise StoreError(f"{path}: no feature index here") from error


def token_label(index: FeatureIndex, feature: int) -> str:
    """The token a feature fires on most, made visible; "dead" for one that never fires."""
    top = int(index.stats["top_token"][feature])
    return label(index.token_bytes(top)) if top >= 0 else "dead"


def fires_on(entry: SaeEntry, feature: int) -> str:
    """`token_label` of a feature of any dictionary; "" without an index or the feature."""
    try:
        index = open_index(entry)
    except StoreError:
        return ""
    return token_label(index, feature) if 0 <= feature < index.d_sae else ""


def comparison_of(a: SaeEntry, b: SaeEntry) -> Comparison | None:
    """`comparison.find`, read again only when one was written."""
    folders = [comparison.folder_of(*pair) for pair in ((a, b), (b, a))]
    stamps = [(f / "compare.json").stat().st_mtime_ns if (f / "compare.json").is_file() else 0 for f in folders]
    return _comparison(a, b, str(a.path), str(b.path), *stamps) if any(stamps) else None


@st.cache_resource(max_entries=4, show_spinner="Reading the comparison …")
def _comparison(_a: SaeEntry, _b: SaeEntry, a: str, b: str, forth: int, back: int) -> Comparison | None:
    return comparison.find(_a, _b)


def open_dictionary(sae_id: str, view: str) -> None:
    """Shows a view of a dictionary: for callbacks only, before the widgets of the next run exist."""
    st.session_state["sae"] = sae_id
    st.session_state["view"] = view


def open_feature(feature: int) -> None:
    """Shows a feature: for callbacks only, before the widgets of the next run exist."""
    st.session_state["feature"] = feature
    st.session_state["view"] = "feature"
    _forget_ranges()


def open_feature_of(sae_id: str, feature: int) -> None:
    """Shows a feature of another dictionary: for callbacks only."""
    st.session_state["sae"] = sae_id
    open_feature(feature)


def step_feature(by: int, d_sae: int) -> None:
    """Moves to a neighbouring feature, round the ends."""
    st.session_state["feature"] = (int(st.session_state["feature"]) + by) % d_sae
    leave_table()


def _forget_ranges() -> None:
    """Ranges dragged over the histograms of the feature left behind."""
    st.session_state["range"] = st.session_state["weights"] = ""


def leave_table() -> None:
    """A feature chosen on the table page is shown; a range dragged for another feature means nothing now."""
    _forget_ranges()
    if st.session_state.get("view") == "features":
        st.session_state["view"] = "feature"


def add_edit(feature: int, edit: str = "set:5") -> None:
    """Puts a feature into the steering set, unless it is there: for callbacks only."""
    edits = str(st.session_state.get(EDITS, "")).split()
    if not any(each.startswith(f"{feature}:") for each in edits):
        set_edits(" ".join([*edits, f"{feature}:{edit}"]))


def set_edits(text: str) -> None:
    """Makes `text` the steering set: for callbacks only."""
    st.session_state[EDITS] = text
