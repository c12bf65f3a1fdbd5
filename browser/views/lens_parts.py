"""What the pages of lenses share: a measure as a table beside its controls, and what to do where there is no result."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from browser import lens_charts, lens_results, state
from browser.lens_results import LensFileError, LensResult
from browser.markup import explain
from browser.state import Page
from browser.tokens import plain_markdown


@st.cache_resource(max_entries=16, show_spinner=False)
def _read(path: Path, stamp: int) -> LensResult:
    return lens_results.read(path)


def read(path: Path) -> LensResult | None:
    """The result, read once; a notice and None where it cannot be read."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (LensFileError, OSError) as error:
        explain("This result cannot be read", str(error))
        return None


def model_command(page: Page, lens: str, *more: str) -> str:
    """The command that runs a lens on the model of the page's dictionary, so that the app finds the result."""
    name = str((page.entry.config.get("model") or {}).get("id", "MODEL"))
    words = ["sae", "lens", lens, name, *more]
    if state.root() != Path("runs").resolve():  # where `sae lens` puts the results of models by default
        words += ["--out", str(state.root() / lens_results.DIRECTORY / Path(name).name)]
    return shlex.join(words)


def dictionary_command(page: Page, lens: str, *more: str) -> str:
    """The command that runs a lens on the page's dictionary."""
    return shlex.join(["sae", "lens", lens, str(page.entry.path), *more])


def measure_box(result: LensResult, names: list[str], key: str) -> str:
    """Lets the reader choose one of the measures."""
    return str(st.selectbox("Measure", names, key=key, bind="query-params"))


def draw_table(table: pd.DataFrame, named: list[str], key: str, config: dict[str, Any]) -> None:
    """A table; where its columns `named` name features or heads, choosing a row opens the page of the first of them."""
    nodes = [
        next((node for name in named if (node := opener(str(row[name]))) is not None), None)
        for row in table[named].to_dict("records")
    ]
    if not any(nodes):
        st.dataframe(table, hide_index=True, key=key, column_config=config)
        return

    def chosen() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        opened = nodes[rows[0]] if rows and rows[0] < len(nodes) else None
        if opened is not None:
            opened()

    st.dataframe(table, hide_index=True, key=key, column_config=config, on_select=chosen, selection_mode="single-row")
    st.caption("Choose a row to open its feature or head.")


def opener(name: str) -> Callable[[], None] | None:
    """What opens the feature or the head that a part is named after: for callbacks only."""
    feature, head = lens_results.feature_named(name), lens_results.head_named(name)
    if feature is not None:
        return lambda: state.open_feature(feature)
    return None if head is None else lambda: state.open_head(*head)


def draw_measure(result: LensResult, name: str, key: str) -> None:
    """A grid where the measure has two axes, then all numbers: value, interval, controls and what they are."""
    measure, found = result.measures[name], lens_results.table(result, name)
    st.caption(plain_markdown(f"{measure.formula}. n = {measure.n:,} {measure.of}; intervals are 95%."))
    if len(measure.axes) == 2 and len(found) > 1:
        st.altair_chart(lens_charts.lens_grid_chart(found, *measure.axes), key=f"{key}-grid")
    numbers = [column for column in found.columns if column not in measure.axes]
    config = {column: st.column_config.NumberColumn(format="%.3f") for column in numbers}
    draw_table(found, list(measure.axes), f"{key}-table", config)
    controls = "; ".join(f"{kind}: {control.what}" for kind, control in measure.controls.items())
    st.caption(plain_markdown(f"Controls. {controls}."))
