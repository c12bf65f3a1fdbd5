"""How the dictionary's model came to use its context: the curves of `sae lens growth` over its snapshots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from browser import lens_charts, lens_results, state
from browser.lens_results import LensResult
from browser.markup import heading, source_line
from browser.state import Page
from browser.tokens import plain_markdown
from browser.views import lens_parts

CURVES = {  # measure → title
    "loss": "Loss",
    "in_context_learning": "In-context learning",
    "prefix_matching": "Prefix matching, best head",
    "repeat_loss": "Loss of a repeat",
    "gain_seen_before": "Gain where the bigram came before",
    "gain_others": "Gain elsewhere",
}
PATH = "loss_path"
PATH_HELP = (
    "Each snapshot is a vector of the losses of the same tokens; the plane is that of its first two principal "
    "components. A bend means that training turned to other tokens there."
)


def show(page: Page) -> None:
    """Draws the curves where there is a result; else says in small print how to get one."""
    if not page.entry.has_model:
        return
    path = lens_results.find(page.entry, state.root()).get("growth")
    if path is None:
        command = lens_parts.model_command(page, "growth")
        st.html(source_line(f"Growth of the model: no result yet. If its training kept snapshots, run: {command}"))
        return
    heading("Growth of the model")
    result = lens_parts.read(path)
    if result is None:
        return
    shown = [name for name in CURVES if name in result.measures]
    columns = st.columns(3)
    for number, name in enumerate(shown):
        with columns[number % 3]:
            _curve(result, name)
    if PATH in result.measures:
        _path(result)


def _curve(result: LensResult, name: str) -> None:
    measure = result.measures[name]
    controls = "; ".join(f"{kind}: {control.what}" for kind, control in measure.controls.items())
    help_ = f"{measure.formula}. n = {measure.n:,} {measure.of}; band: 95% interval. Dashed: {controls}."
    st.caption(CURVES[name], help=plain_markdown(help_))
    table = lens_results.table(result, name)
    tokens = _tokens(result)[-len(table) :]  # a gain belongs to the later of its two snapshots
    numbers = [column for column in table.columns if column not in measure.axes]
    st.altair_chart(
        lens_charts.growth_chart(table[numbers].assign(tokens=tokens), list(measure.controls)), key=f"growth-{name}"
    )


def _tokens(result: LensResult) -> list[float]:
    """How many tokens each snapshot had seen; their numbers if the result does not say."""
    n = max((m.figure.value.shape[0] for m in result.measures.values() if m.axes[:1] == ("snapshot",)), default=0)
    found = result.labels.get("tokens")
    known = isinstance(found, list) and len(found) == n and all(isinstance(each, int) for each in found)
    return [float(each) for each in found] if known and isinstance(found, list) else list(map(float, range(n)))


def _path(result: LensResult) -> None:
    measure = result.measures[PATH]
    st.caption("Path of the per-token losses", help=plain_markdown(PATH_HELP + f" {measure.formula}."))
    paths = {"training": measure.figure.value} | {kind: each.value for kind, each in measure.controls.items()}
    names = result.names("snapshot", PATH, len(measure.figure.value))
    points = pd.concat(
        pd.DataFrame({"snapshot": names, "order": range(len(names)), "x": each[:, 0], "y": each[:, 1], "path": name})
        for name, each in paths.items()
    )
    st.altair_chart(lens_charts.loss_path_chart(points, _explained(result)), key="growth-path")


def _explained(result: LensResult) -> tuple[str, str]:
    """Titles of the axes: how much of the variance each explains, and of the control's."""
    titles = ["first component", "second component"]
    measure = result.measures.get(f"{PATH}_explained")
    if measure is None:
        return titles[0], titles[1]
    control: Any = next(iter(measure.controls.values())).value
    shares = zip(titles, np.atleast_1d(measure.figure.value), np.atleast_1d(control), strict=False)
    first, second = (f"{title}: {own:.0%} ({other:.0%} in random order)" for title, own, other in shares)
    return first, second
