"""What the pages of lenses share: a measure as a table beside its controls, and what to do where there is no result."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from browser import charts, lens_results
from browser.lens_results import LensFileError, LensResult
from browser.markup import explain
from browser.state import Page


@st.cache_resource(max_entries=8, show_spinner=False)
def _read(path: Path, stamp: int) -> LensResult:
    return lens_results.read(path)


def read(path: Path) -> LensResult | None:
    """The result, read once; a notice and None where it cannot be read."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (LensFileError, OSError) as error:
        explain("This result cannot be read", str(error))
        return None


def model_name(page: Page) -> str:
    """The model of the page's dictionary, as `sae lens` takes it."""
    return str((page.entry.config.get("model") or {}).get("id", "MODEL"))


def measure_box(result: LensResult, names: list[str], key: str) -> str:
    """Lets the reader choose one of the measures."""
    return str(st.selectbox("Measure", names, key=key, bind="query-params"))


def draw_measure(result: LensResult, name: str, key: str) -> None:
    """A grid where the measure has two axes, then all numbers: value, interval, controls and what they are."""
    measure, found = result.measures[name], lens_results.table(result, name)
    st.caption(f"{measure.formula}. n = {measure.n:,} {measure.of}; intervals are 95%.")
    if len(measure.axes) == 2 and len(found) > 1:
        st.altair_chart(charts.lens_grid_chart(found, *measure.axes), key=f"{key}-grid")
    numbers = [column for column in found.columns if column not in measure.axes]
    config = {column: st.column_config.NumberColumn(format="%.3f") for column in numbers}
    st.dataframe(found, hide_index=True, key=f"{key}-table", column_config=config)
    st.caption("Controls. " + "; ".join(f"{kind}: {control.what}" for kind, control in measure.controls.items()) + ".")
