"""What the views share: the root, cached data, and moves from one view to another.

State lives in widgets that are bound to the URL; a move sets their session keys inside a callback.
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
from browser.tokens import label
from store.common import StoreError
from store.features import FeatureIndex
from store.notes import Notes, NotesError

ROOT_VARIABLE = "MONOSEM_ROOT"
EDITS = "edits"  # the steering set, as text


@dataclass(frozen=True)
class Page:
    """What a view draws: a dictionary, the chosen feature, and all dictionaries below the root."""

    entry: SaeEntry
    feature: int
    entries: Mapping[str, SaeEntry]

    @cached_property
    def index(self) -> FeatureIndex:
        """The dictionary's feature index. Raises StoreError if it has none."""
        return open_index(self.entry)


def root() -> Path:
    """The runs directory the app was started on."""
    return Path(os.environ.get(ROOT_VARIABLE, "runs")).resolve()


@st.cache_resource(ttl=5, show_spinner=False)
def saes(folder: Path) -> list[SaeEntry]:
    """SAEs below `folder`, searched again after five seconds."""
    return data.scan(folder)


@st.cache_resource(ttl=5, show_spinner="Reading the runs …")
def summaries(folder: Path) -> list[runs.Summary]:
    """What the start page says about each of `saes(folder)`, read again after five seconds."""
    return [runs.summary(entry) for entry in saes(folder)]


@st.cache_resource(show_spinner=False)
def freeze_garbage_collection() -> None:
    """Takes what is loaded by the first page out of garbage collection, once.

    Else each full collection would delay a page by a tenth of a second.
    """
    gc.collect()
    gc.freeze()


def open_index(entry: SaeEntry) -> FeatureIndex:
    """The entry's index, opened once and again after it was rebuilt. Raises StoreError."""
    return _open_index(entry.index_path, _stamp(entry.index_path))


@st.cache_resource(max_entries=8, show_spinner=False)
def _open_index(path: Path, stamp: int) -> FeatureIndex:
    return FeatureIndex.open(path)


def table_of(page: Page) -> pd.DataFrame:
    """`catalogue.feature_table` of the page's index with your own labels; callers must not change it."""
    table = _feature_table(page.index, page.index.path, _stamp(page.index.path))
    try:
        return catalogue.with_labels(table, Notes(page.entry.path).all())
    except NotesError:  # the feature's page reports it
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
    """When the index at `path` was built, in ns."""
    try:
        return (path / "zarr.json").stat().st_mtime_ns
    except OSError as error:
        raise StoreError(f"{path}: no feature index here") from error


def token_label(index: FeatureIndex, feature: int) -> str:
    """The token that a feature fires on most, made visible; "dead" if it never fires."""
    top = int(index.stats["top_token"][feature])
    return label(index.token_bytes(top)) if top >= 0 else "dead"


def fires_on(entry: SaeEntry, feature: int) -> str:
    """`token_label` of a feature of any dictionary; "" without an index or for an unknown feature."""
    try:
        index = open_index(entry)
    except StoreError:
        return ""
    return token_label(index, feature) if 0 <= feature < index.d_sae else ""


def comparison_of(a: SaeEntry, b: SaeEntry) -> Comparison | None:
    """`comparison.find`, cached until a comparison is written."""
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
    _clear_ranges()


def open_head(layer: int, head: int) -> None:
    """Shows a head of the dictionary's model: for callbacks only."""
    st.session_state["layer"], st.session_state["head"] = layer, head
    st.session_state["view"] = "heads"


def open_result(name: str, measure: str) -> None:
    """Shows a measure of a saved result about a task: for callbacks only."""
    st.session_state["result"], st.session_state["measure"] = name, measure
    st.session_state["view"] = "patching"


def open_feature_of(sae_id: str, feature: int) -> None:
    """Shows a feature of another dictionary: for callbacks only."""
    st.session_state["sae"] = sae_id
    open_feature(feature)


def step_feature(by: int, d_sae: int) -> None:
    """Moves to a neighbouring feature; after the last comes the first: for callbacks only."""
    st.session_state["feature"] = (int(st.session_state["feature"]) + by) % d_sae
    feature_changed()


def _clear_ranges() -> None:
    """Clears the ranges that were dragged over the histograms of the previous feature."""
    st.session_state["range"] = st.session_state["weights"] = ""


def feature_changed() -> None:
    """Shows the chosen feature if the table was open, without the ranges of the previous one: for callbacks only."""
    _clear_ranges()
    if st.session_state.get("view") == "features":
        st.session_state["view"] = "feature"


def add_edit(feature: int, edit: str = "set:5") -> None:
    """Adds a feature to the steering set unless it is in it: for callbacks only."""
    edits = str(st.session_state.get(EDITS, "")).split()
    if not any(each.startswith(f"{feature}:") for each in edits):
        set_edits(" ".join([*edits, f"{feature}:{edit}"]))


def set_edits(text: str) -> None:
    """Replaces the steering set: for callbacks only."""
    st.session_state[EDITS] = text
