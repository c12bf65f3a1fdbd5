"""Altair charts of steering: surprisal of the new tokens, and probabilities of the next token."""

from __future__ import annotations

import json

import altair as alt
import pandas as pd

from browser.charts import HEIGHT
from browser.style import BLUE, ORANGE


def surprisal_chart(base: list[float], steered: list[float]) -> alt.Chart:
    """−log p of each new token under the base model, in nats, for the base text and the steered text."""
    frame = pd.concat(
        pd.DataFrame({"token": range(1, len(values) + 1), "nats": values, "text": text})
        for text, values in (("base", base), ("steered", steered))
    )
    chart: alt.Chart = (
        alt.Chart(frame)
        .mark_line(point=alt.OverlayMarkDef(size=12), strokeWidth=1.3)
        .encode(
            x=alt.X(
                "token:Q", scale=alt.Scale(nice=False), axis=alt.Axis(title="new token", grid=False, tickMinStep=1)
            ),
            y=alt.Y("nats:Q", axis=alt.Axis(title=None, tickCount=4)),
            color=alt.Color(
                "text:N",
                scale=alt.Scale(domain=["base", "steered"], range=[BLUE, ORANGE]),
                legend=alt.Legend(title=None, orient="right"),
            ),
            tooltip=["text", "token", alt.Tooltip("nats:Q", format=".2f")],
        )
        .properties(height=HEIGHT)
    )
    return chart


def next_token_chart(names: list[str], base: list[float], steered: list[float]) -> alt.Chart:
    """Two bars per candidate for the next token: its probability without and with the edits."""
    order = [f"{i:02d}" for i in range(len(names))]  # two tokens may have the same name
    frame = pd.concat(
        pd.DataFrame({"place": order, "name": names, "p": values, "text": text})
        for text, values in (("base", base), ("steered", steered))
    )
    labels = ", ".join(f"'{place}': {json.dumps(name)}" for place, name in zip(order, names, strict=True))
    chart: alt.Chart = (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            y=alt.Y("place:N", sort=None, axis=alt.Axis(title=None, labelExpr=f"({{{labels}}})[datum.value]")),
            yOffset=alt.YOffset("text:N", sort=["base", "steered"]),
            x=alt.X("p:Q", axis=alt.Axis(title="probability", tickCount=5)),
            color=alt.Color(
                "text:N",
                scale=alt.Scale(domain=["base", "steered"], range=[BLUE, ORANGE]),
                legend=alt.Legend(title=None, orient="bottom-right"),
            ),
            tooltip=["name", "text", alt.Tooltip("p:Q", format=".4f")],
        )
        .properties(height=26 * len(names) + 20)
    )
    return chart
