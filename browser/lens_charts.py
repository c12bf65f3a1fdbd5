"""Altair charts of the results of lenses: a measure by two axes, its growth over training, the path of losses."""

from __future__ import annotations

import json

import altair as alt
import numpy as np
import pandas as pd

from browser.charts import GREY, HEIGHT
from browser.style import BLUE, ORANGE


def lens_grid_chart(table: pd.DataFrame, row: str, column: str) -> alt.Chart:
    """A measure of a lens by two axes; the tooltip has its interval and controls.

    White is where nothing happens: 0, or 1 where that is what the identity patch gives. Both colours reach equally far.
    """
    middle = 1.0 if "identity" in table and np.allclose(table["identity"], 1, atol=1e-3) else 0.0
    reach = float((table["value"] - middle).abs().max()) or 1.0
    controls = [name for name in table.columns if name not in (row, column)]
    chart: alt.Chart = (
        alt.Chart(table)
        .mark_rect()
        .encode(
            x=alt.X(f"{column}:N", sort=None, axis=alt.Axis(title=None, labelAngle=-40)),
            y=alt.Y(f"{row}:N", sort=None, axis=alt.Axis(title=None, labelOverlap=False)),
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(scheme="blueorange", domain=[middle - reach, middle + reach]),
                legend=alt.Legend(title=None),
            ),
            tooltip=[row, column, *(alt.Tooltip(f"{name}:Q", format=".3f") for name in controls)],
        )
        .properties(height=22 * table[row].nunique() + 90)  # names of columns are written below
    )
    return chart


def growth_chart(table: pd.DataFrame, controls: list[str]) -> alt.LayerChart:
    """A measure by tokens of training: value with its interval, and each control as a dashed line.

    `table` has the columns tokens, value, perhaps low and high, and one for each control.
    """
    x = alt.X("tokens:Q", axis=alt.Axis(title="tokens of training", grid=False, tickCount=5, format="~s"))
    axis = alt.Axis(title=None, tickCount=4, format=".3~g")
    y = alt.Y("value:Q", scale=alt.Scale(zero=False), axis=axis)
    numbers = [name for name in table.columns if name != "tokens"]
    tooltip = [alt.Tooltip("tokens:Q", format=","), *(alt.Tooltip(f"{name}:Q", format=".3f") for name in numbers)]
    base = alt.Chart(table).encode(x=x, tooltip=tooltip)
    layers = base.mark_line(color=BLUE, strokeWidth=1.6, point=alt.OverlayMarkDef(color=BLUE, size=22)).encode(y=y)
    if {"low", "high"} <= set(table.columns):
        layers = base.mark_area(color=BLUE, opacity=0.2).encode(y=alt.Y("low:Q", axis=axis), y2="high:Q") + layers
    for name in controls:
        dashed = base.mark_line(color=GREY, strokeDash=[5, 3], strokeWidth=1.4)
        layers += dashed.encode(y=alt.Y(f"{name}:Q", axis=axis))
    chart: alt.LayerChart = layers.properties(height=HEIGHT)
    return chart


def loss_path_chart(points: pd.DataFrame, explained: tuple[str, str]) -> alt.LayerChart:
    """The snapshots as points of the plane in which their per-token losses differ most, in the order of training.

    `points` has the columns snapshot, order, x, y and path ("training" or the name of a control).
    """
    order = list(dict.fromkeys(points["path"]))
    x, y = (
        alt.X("x:Q", axis=alt.Axis(title=explained[0], grid=False, tickCount=5)),
        alt.Y("y:Q", axis=alt.Axis(title=explained[1], tickCount=4)),
    )
    base = alt.Chart(points).encode(
        x=x,
        y=y,
        order="order:Q",
        color=alt.Color(
            "path:N",
            scale=alt.Scale(domain=order, range=[BLUE, *[GREY] * (len(order) - 1)]),
            legend=alt.Legend(title=None, orient="bottom"),
        ),
        tooltip=["snapshot", "path", alt.Tooltip("x:Q", format=".2f"), alt.Tooltip("y:Q", format=".2f")],
    )
    names = base.transform_filter(alt.datum.path == order[0]).mark_text(align="left", dx=6, fontSize=10)
    chart: alt.LayerChart = (base.mark_line(point=True, strokeWidth=1.3) + names.encode(text="snapshot:N")).properties(
        height=220
    )
    return chart


def reading_chart(table: pd.DataFrame, layers: list[str], names: dict[str, str], chosen: str) -> alt.LayerChart:
    """What a lens reads, by layer and position: the token as text, its probability as the strength of the colour.

    `table` has the columns layer, position, reads, p, kl, kl_elsewhere; `names` are the tokens by position.
    """
    labels = ", ".join(f"'{place}': {json.dumps(name)}" for place, name in names.items())
    x = alt.X(
        "position:N",
        sort=None,
        axis=alt.Axis(
            title=None, labelExpr=f"({{{labels}}})[datum.value]", labelAngle=-40, labelLimit=90, orient="top"
        ),
    )
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("reads:N"),
        alt.Tooltip("p:Q", format=".3f"),
        alt.Tooltip("kl:Q", format=".3f", title="KL to the last layer"),
        alt.Tooltip("kl_elsewhere:Q", format=".3f", title="KL, other positions"),
    ]
    y = alt.Y("layer:N", sort=layers, axis=alt.Axis(title=None))
    base = alt.Chart(table).encode(x=x, y=y, tooltip=tooltip)
    strength = alt.Opacity("p:Q", scale=alt.Scale(domain=[0, 1], range=[0.04, 0.85]), legend=None)
    cells = base.mark_rect(color=ORANGE).encode(opacity=strength)
    ring = base.transform_filter(alt.datum.position == chosen).mark_rect(fillOpacity=0, stroke=BLUE, strokeWidth=1.5)
    text = base.mark_text(fontSize=10.5, limit=66).encode(text="reads:N")
    chart: alt.LayerChart = (cells + ring + text).properties(height=24 * len(layers) + 60)
    return chart
