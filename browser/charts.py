"""Altair charts of training, evaluation and specificity; Streamlit's theme sets the colours of text and grid."""

from __future__ import annotations

import altair as alt
import pandas as pd

from browser.style import BLUE, ORANGE, VIOLET

HEIGHT = 118
GREY = "#8a8a8a"  # of baselines, in light and dark


def divergence_chart(kl: list[float]) -> alt.Chart:
    """KL(steered ‖ base) of the next-token distributions at each new token, in nats."""
    frame = pd.DataFrame({"token": range(1, len(kl) + 1), "kl": kl})
    chart: alt.Chart = (
        alt.Chart(frame)
        .mark_bar(color=BLUE)
        .encode(
            x=alt.X("token:O", axis=alt.Axis(title="new token", labelOverlap=True, labelAngle=0)),
            y=alt.Y("kl:Q", axis=alt.Axis(title=None, tickCount=4)),
            tooltip=["token", alt.Tooltip("kl:Q", format=".3f")],
        )
        .properties(height=HEIGHT)
    )
    return chart


def level_chart(levels: pd.DataFrame) -> alt.Chart:
    """Share of the firings on which a rule holds, by activation; a bar is as wide as its interval."""
    chart: alt.Chart = (
        alt.Chart(levels)
        .mark_bar(color=ORANGE, binSpacing=1)
        .encode(
            x=alt.X("low:Q", bin="binned", axis=alt.Axis(title=None, tickCount=6, grid=False)),
            x2="high:Q",
            y=alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=None, format="%", tickCount=4)),
            tooltip=[
                alt.Tooltip("low:Q", format=".3g", title="above"),
                alt.Tooltip("high:Q", format=".3g", title="up to"),
                alt.Tooltip("firings:Q", format=","),
                alt.Tooltip("share:Q", format=".1%", title="rule holds"),
            ],
        )
        .properties(height=150)
    )
    return chart


def curve_chart(curve: pd.DataFrame) -> alt.Chart:
    """Precision, recall and F1 of "activation > threshold" as a detector of a rule, by threshold."""
    names = {"precision": BLUE, "recall": ORANGE, "f1": VIOLET}
    long = curve.melt("threshold", list(names), var_name="score", value_name="value")
    chart: alt.Chart = (
        alt.Chart(long)
        .mark_line()
        .encode(
            x=alt.X("threshold:Q", axis=alt.Axis(title=None, tickCount=6, grid=False)),
            y=alt.Y("value:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=None, tickCount=4)),
            color=alt.Color(
                "score:N",
                scale=alt.Scale(domain=list(names), range=list(names.values())),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            strokeDash=alt.StrokeDash("score:N", legend=None),
            tooltip=["score", alt.Tooltip("threshold:Q", format=".3g"), alt.Tooltip("value:Q", format=".3f")],
        )
        .properties(height=150)
    )
    return chart


def training_chart(
    log: pd.DataFrame, name: str, resampled: list[int], baseline: tuple[str, float] | None = None
) -> alt.LayerChart:
    """One logged number by training step; dashed lines where dead features were resampled, and at the baseline."""
    line = (
        alt.Chart(log)
        .mark_line(color=BLUE, strokeWidth=1.6)
        .encode(
            x=alt.X("step:Q", axis=alt.Axis(title=None, tickCount=5, grid=False, format="~s")),
            y=alt.Y(f"{name}:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title=None, tickCount=4, format=".3~g")),
            tooltip=[alt.Tooltip("step:Q", format=","), alt.Tooltip(f"{name}:Q", format=".4g")],
        )
    )
    rules = alt.Chart(pd.DataFrame({"step": resampled}, dtype=float)).mark_rule(
        color=ORANGE, strokeDash=[3, 3], opacity=0.7
    )
    layers = line + rules.encode(x="step:Q")
    if baseline is not None:
        what, value = baseline
        layers += _baseline_rule(name, what, value)
    chart: alt.LayerChart = layers.properties(height=HEIGHT)
    return chart


def _baseline_rule(name: str, what: str, value: float) -> alt.LayerChart:
    """A dashed horizontal line at a value of the layer's own units, with its name."""
    base = alt.Chart(pd.DataFrame({name: [value], "what": [what]})).encode(
        y=f"{name}:Q", tooltip=["what", alt.Tooltip(f"{name}:Q", format=".4g")]
    )
    text = base.mark_text(align="right", dy=-6, dx=-2, fontSize=10, color=GREY).encode(
        x=alt.value("width"), text="what"
    )
    chart: alt.LayerChart = base.mark_rule(color=GREY, strokeDash=[5, 3], strokeWidth=1.4) + text
    return chart


def density_chart(histogram: pd.DataFrame) -> alt.Chart:
    """Features by log₁₀ density; ultra-low and dense ones in separate colours."""
    colour = (
        alt.when("datum.high <= -5")
        .then(alt.value(VIOLET))
        .when("datum.low >= -1")
        .then(alt.value(BLUE))
        .otherwise(alt.value(ORANGE))
    )
    chart: alt.Chart = (
        alt.Chart(histogram)
        .mark_bar(binSpacing=0.5)
        .encode(
            x=alt.X("low:Q", bin="binned", axis=alt.Axis(tickCount=6, grid=False, title=None, labelFontSize=10)),
            x2="high:Q",
            y=alt.Y("count:Q", axis=alt.Axis(title=None, labelFontSize=10, format="~s", tickCount=3)),
            color=colour,
            tooltip=[
                alt.Tooltip("low:Q", format=".3g", title="above"),
                alt.Tooltip("high:Q", format=".3g", title="up to"),
                alt.Tooltip("count:Q", format=",", title="features"),
            ],
        )
        .properties(height=HEIGHT)
    )
    return chart


def share_chart(histogram: pd.DataFrame) -> alt.LayerChart:
    """Features by the share of one site in their decoder norms; the grey steps are the control's."""
    x = alt.X("low:Q", bin="binned", axis=alt.Axis(tickCount=5, grid=False, title=None, format=".1f"))
    y = alt.Axis(title=None, labelFontSize=10, format="~s", tickCount=3)
    tooltip = [
        alt.Tooltip("low:Q", format=".2f", title="share from"),
        alt.Tooltip("high:Q", format=".2f", title="to"),
        alt.Tooltip("features:Q", format=","),
        alt.Tooltip("control:Q", format=",.1f"),
    ]
    bars = (
        alt.Chart(histogram)
        .mark_bar(color=BLUE, binSpacing=0.5)
        .encode(x=x, x2="high:Q", y=alt.Y("features:Q", axis=y), tooltip=tooltip)
    )
    control = alt.Chart(histogram.dropna(subset=["control"])).mark_rule(color=GREY, strokeWidth=2)
    layers = bars + control.encode(x="low:Q", x2="high:Q", y=alt.Y("control:Q", axis=y), tooltip=tooltip)
    chart: alt.LayerChart = layers.properties(height=HEIGHT)
    return chart


def frontier_chart(table: pd.DataFrame) -> alt.LayerChart:
    """FVU by L0 (logarithmic), one line for each recipe and size; a ring marks the run that is shown.

    The dashed line is the k largest of the layer's own units, k being the L0 of each run.
    """
    series = table.assign(series=table["recipe"] + " " + table["d_sae"].astype(str))
    base = alt.Chart(series).encode(
        x=alt.X("l0:Q", scale=alt.Scale(type="log"), axis=alt.Axis(title="L0", grid=False, tickCount=6)),
        y=alt.Y("fvu:Q", axis=alt.Axis(title="FVU", tickCount=5)),
        color=alt.Color("series:N", legend=alt.Legend(title=None, orient="bottom")),
        tooltip=[
            "id",
            alt.Tooltip("l0:Q", format=".1f"),
            alt.Tooltip("fvu:Q", format=".4f"),
            alt.Tooltip("ce_loss_score:Q", format=".4f"),
        ],
    )
    lines, points = base.mark_line(opacity=0.5), base.mark_point(filled=True, size=45)
    ring = base.transform_filter("datum.this").mark_point(size=180, strokeWidth=2)
    chart: alt.LayerChart = (_units_line(table) + lines + points + ring).properties(height=220)
    return chart


def _units_line(table: pd.DataFrame) -> alt.LayerChart:
    units = table[["units_k", "units_l0", "units_fvu"]].dropna().drop_duplicates("units_k")
    units = pd.DataFrame({"k": units["units_k"], "l0": units["units_l0"], "fvu": units["units_fvu"]}, dtype=float)
    base = alt.Chart(units[units["l0"] > 0].assign(what="largest own units")).encode(
        x="l0:Q",
        y="fvu:Q",
        tooltip=[
            alt.Tooltip("what:N", title="baseline"),
            alt.Tooltip("k:Q", format=",.0f"),
            alt.Tooltip("l0:Q", format=".1f"),
            alt.Tooltip("fvu:Q", format=".4f"),
        ],
    )
    line = base.mark_line(color=GREY, strokeDash=[5, 3], strokeWidth=1.4)
    chart: alt.LayerChart = line + base.mark_point(color=GREY, filled=True, size=22)
    return chart
