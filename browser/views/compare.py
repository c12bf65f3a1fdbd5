"""Two dictionaries: which features of one are in the other, which split, which have no partner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st

from browser import comparison, runs, state
from browser.comparison import Comparison
from browser.components import Row, RowList, draw_lists
from browser.data import SaeEntry, read_config
from browser.live import LiveError
from browser.live.comparing import cosine_table
from browser.markup import explain, facts
from browser.state import Page
from browser.style import BLUE, ORANGE
from store.common import same_model

LISTS = {"matched": "Matched", "unmatched": "Unmatched in A", "alone": "Unmatched in B", "splits": "Splitting"}
HELP = {
    "facts": "compared: features with enough firings. mean best A→B: mean over the features of A of the largest "
    "Pearson correlation of activations with a feature of B on the same tokens. By chance: the same with B's tokens "
    "shuffled. decoder cosine: the mean of their largest decoder cosines with a feature of B.",
    "units": "Fidelity on held-out text (sae eval), next to that of the baseline: as many of the layer's own units as "
    "the dictionary has active features, the largest by absolute value.",
    "histogram": "For each feature of A with enough firings: its largest Pearson correlation of activations with any "
    "feature of B on the same tokens. For comparison: the same with B's tokens shuffled (what the largest of many "
    "correlations gives by chance), and with A's own neurons. Solid lines: the means here. The dashed lines are means "
    "published by Bricken et al. 2023 for two other models (A/1 and B/1): 0.72 for features, 0.46 for neurons.",
    "matched": "One-to-one matching with the largest sum of Pearson correlations. best: the largest correlation "
    "without that constraint. cosine: the largest decoder cosine with any feature of B, d_A · d_B / (‖d_A‖ ‖d_B‖), if "
    "both dictionaries read the same activations. density: firings / kept tokens.",
    "unmatched": "Features with enough firings that have no partner, or none above the matching's minimum correlation. "
    "nearest: the feature of the other dictionary with the largest Pearson correlation.",
    "splits": "Features of A that correspond to several of B. masked: Pearson correlation over the tokens on which the "
    "child (or the parent) fires; it is high if one is a part of the other.",
}
SHOWN = 2000


def show(page: Page) -> None:
    """Draws the comparison of the dictionary with another one."""
    others = [name for name in page.entries if name != page.entry.id]
    if not others:
        explain(
            "There is no second dictionary to compare with",
            "Train another one (with another seed, size or recipe) below this root:",
            "sae train --acts runs/a/acts.zarr --seed 1 --out runs/a/other",
        )
        return
    pick, which = st.columns([0.4, 0.6], vertical_alignment="bottom")
    name = str(pick.selectbox("Compare this dictionary (A) with B", others, key="other", bind="query-params"))
    other = page.entries[name]
    joined = next((entry for entry in (page.entry, other) if entry.is_crosscoder), None)
    if joined is not None:
        explain(
            f"{joined.id} is a crosscoder",
            "Its rows join several hook points or models, so its features cannot be matched with those of one hook "
            "point. Its view Run shows which of them belong to which site.",
        )
        return
    found = state.comparison_of(page.entry, other)
    if found is None:
        _by_weights(page, other)
        return
    chosen = which.segmented_control(
        "Features",
        list(LISTS),
        format_func=LISTS.__getitem__,
        default="matched",
        required=True,
        key="side",
        bind="query-params",
    )
    _facts(page, other, found)
    left, right = st.columns([0.62, 0.38], gap="medium")
    with left:
        _table(page, other, found, str(chosen))
    with right:
        st.caption("Universality: best correlation of each feature", help=HELP["histogram"])
        st.altair_chart(_histogram(found), key="universality")
        _children(page, other, found)


def _labels(entry: SaeEntry, features: pd.Series) -> list[str]:
    """The token that each feature fires on most; "" without an index or a feature."""
    return ["" if pd.isna(f) else state.fires_on(entry, int(f)) for f in features]


def _facts(page: Page, other: SaeEntry, found: Comparison) -> None:
    a, b = found.a["correlation"].dropna(), found.b["correlation"].dropna()
    matched = found.a["matched"].notna().sum()
    values = {
        "tokens": f"{found.summary.get('tokens', 0):,}",
        "A, compared": f"{len(a):,} of {len(found.a):,}",
        "B, compared": f"{len(b):,} of {len(found.b):,}",
        "matched pairs": f"{matched:,}",
        "mean best A→B": f"{a.mean():.3f}",
        "mean best B→A": f"{b.mean():.3f}",
        "A→B by chance": f"{found.a['shuffled_correlation'].mean():.3f}",
        "decoder cosine": f"{found.a['cosine'].mean():.3f}"
        if found.a["cosine"].notna().any()
        else "different activations",
    }
    st.html(facts(values, help=HELP["facts"]))
    beside = dict(line for side, entry in (("A", page.entry), ("B", other)) for line in _against_units(side, entry))
    if beside:
        st.html(facts(beside, help=HELP["units"]))


def _against_units(side: str, entry: SaeEntry) -> Iterator[tuple[str, str]]:
    """The dictionary's score and that of as many of the layer's own units, where they were measured."""
    own, score = runs.baseline_of(read_config(entry.path / "eval.json")), runs.headline_metrics(entry)["ce_loss_score"]
    of_units = own and own.largest.get("ce_loss_score_zero")
    if own and of_units is not None and score is not None:
        yield f"{side}: ce_loss_score", f"{score:.4f}"
        yield f"{own.k:,} largest own units", f"{of_units:.4f}" + (" (as faithful)" if own.verdict else "")


def _table(page: Page, other: SaeEntry, found: Comparison, chosen: str) -> None:
    """Draws the chosen list."""
    if chosen == "splits":
        _draw(_splits(page, found), page.entry, "compare-splits", HELP["splits"])
    elif chosen == "matched":
        _draw(_matched(page, other, found), page.entry, "compare-matched", HELP["matched"])
    elif chosen == "unmatched":
        _draw(_unmatched(page.entry, other, found.a), page.entry, "compare-unmatched", HELP["unmatched"])
    else:
        _draw(_unmatched(other, page.entry, found.b), other, "compare-alone", HELP["unmatched"])


def _splits(page: Page, found: Comparison) -> pd.DataFrame:
    least = st.slider("Masked correlation, at least", 0.4, 1.0, 0.6, 0.05, key="masked", bind="query-params")
    table = comparison.splits(found, float(least)).head(SHOWN)
    table.insert(1, "fires on", _labels(page.entry, table["feature"]))
    return table


def _matched(page: Page, other: SaeEntry, found: Comparison) -> pd.DataFrame:
    """The pairs of the one-to-one matching, largest correlation first."""
    pairs = found.a[found.a["matched"].notna()].sort_values("matched_correlation", ascending=False).head(SHOWN)
    return pd.DataFrame(
        {
            "feature": pairs["feature"],
            "fires on": _labels(page.entry, pairs["feature"]),
            "B": pairs["matched"].astype("Int64"),
            "B fires on": _labels(other, pairs["matched"]),
            "correlation": pairs["matched_correlation"],
            "best": pairs["correlation"],
            "cosine": pairs["cosine"],
            "density": pairs["density"],
        }
    )


def _unmatched(entry: SaeEntry, partner: SaeEntry, features: pd.DataFrame) -> pd.DataFrame:
    """The features of `entry` without a match, highest density first."""
    rows = features[features["matched"].isna() & features["correlation"].notna()]
    rows = rows.sort_values("density", ascending=False).head(SHOWN)
    return pd.DataFrame(
        {
            "feature": rows["feature"],
            "fires on": _labels(entry, rows["feature"]),
            "nearest": rows["best"].astype("Int64"),
            "it fires on": _labels(partner, rows["best"]),
            "correlation": rows["correlation"],
            "density": rows["density"],
        }
    )


def _draw(table: pd.DataFrame, entry: SaeEntry, key: str, help_: str) -> None:
    if table.empty:
        explain("This list is empty", "No feature meets its condition.")
        return
    numbers = table["feature"].to_numpy()

    def opened() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows and rows[0] < len(numbers):
            state.open_feature_of(entry.id, int(numbers[rows[0]]))

    number = st.column_config.NumberColumn
    bar = st.column_config.ProgressColumn("correlation", format="%.3f", min_value=0, max_value=1, width=120)
    st.dataframe(
        table,
        key=key,
        height=540,
        row_height=27,
        hide_index=True,
        lazy=False,
        on_select=opened,
        selection_mode="single-row",
        column_config={
            "feature": number("feature", format="%d", width=66, pinned=True),
            "correlation": bar,
            "best": number("best", format="%.3f", width=60),
            "cosine": number("cosine", format="%.3f", width=64),
            "masked": number("masked", format="%.3f", width=66),
            "density": number("density", format="%.1e", width=72),
            "into": number("into", format="%d", width=50),
        },
    )
    st.caption(f"{len(table):,} features. Select a row to open its feature.", help=help_)


def _histogram(found: Comparison) -> alt.LayerChart:
    domain = ["features", "shuffled tokens", "neurons of A"]
    bars = (
        alt.Chart(comparison.histograms(found))
        .mark_area(interpolate="step", opacity=0.45)
        .encode(
            x=alt.X("low:Q", axis=alt.Axis(title="Pearson correlation", grid=False), scale=alt.Scale(domain=[-0.2, 1])),
            y=alt.Y("share:Q", stack=None, axis=alt.Axis(title="share of features", format="%", tickCount=4)),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=domain, range=[ORANGE, "#9a9a9a", BLUE]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=["what", alt.Tooltip("low:Q", format=".2f"), alt.Tooltip("share:Q", format=".1%")],
        )
    )
    paper = pd.DataFrame(
        {
            "at": [comparison.PAPER["features_a_to_b"], comparison.PAPER["neurons_a_to_b"]],
            "text": ["paper, features 0.72", "paper, neurons 0.46"],
            "colour": [ORANGE, BLUE],
        }
    )
    rule = (
        alt.Chart(paper)
        .mark_rule(strokeDash=[4, 3], strokeWidth=1.6)
        .encode(x="at:Q", color=alt.Color("colour:N", scale=None), tooltip=["text"])
    )
    text = (
        alt.Chart(paper)
        .mark_text(angle=270, align="right", dy=-6, dx=-4, fontSize=10)
        .encode(x="at:Q", y=alt.value(4), text="text", color=alt.Color("colour:N", scale=None))
    )
    means = pd.DataFrame(
        {
            "at": [found.a[column].mean() for column in ("correlation", "neuron_correlation")],
            "mean": ["features here", "neurons here"],
            "colour": [ORANGE, BLUE],
        }
    ).dropna()
    here = (
        alt.Chart(means)
        .mark_rule(strokeWidth=1.6)
        .encode(x="at:Q", color=alt.Color("colour:N", scale=None), tooltip=["mean", alt.Tooltip("at:Q", format=".3f")])
    )
    layers: alt.LayerChart = (bars + rule + text + here).properties(height=240)
    return layers


def _children(page: Page, other: SaeEntry, found: Comparison) -> None:
    """The features of B that the chosen feature corresponds to."""
    below = comparison.children(found, page.feature, 0.4).head(14)
    labels = _labels(other, below["b"])
    rows = [
        Row(text, f"{masked:.3f}", float(masked), f"r {correlation:.2f}", prefix=f"└ {b}", open=int(b))
        for text, masked, correlation, b in zip(labels, below["masked"], below["correlation"], below["b"], strict=True)
    ]
    (own,) = _labels(page.entry, pd.Series([page.feature]))
    title = f"Feature {page.feature} {own} in {other.id}"
    draw_lists(
        [RowList(title, rows, HELP["splits"], empty="corresponds to no feature of B")],
        key="children",
        on_open=lambda feature: state.open_feature_of(other.id, feature),
    )


def _of_one_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether both record the same model; an imported dictionary may know only its name."""
    one, other = (config.get("model") or {} for config in (a, b))
    return one == other or same_model(one, other)


def _output(config: dict[str, Any]) -> tuple[Any, Any]:
    """The hook point and width of what a dictionary writes, to which its decoder directions belong."""
    return config.get("target_hook_point") or config.get("hook_point"), config.get("d_out") or config.get("d_in")


def _by_weights(page: Page, other: SaeEntry) -> None:
    """Without a comparison on text: decoder cosines, if both dictionaries write to the same activations."""
    command = f"sae compare {page.entry.path} {other.path}"
    configs = (page.entry.config, other.config)
    if not _of_one_model(*configs) or _output(configs[0]) != _output(configs[1]):
        explain(
            "These dictionaries describe different activations",
            "Their decoder directions cannot be compared, only their activations on the same tokens. One command does "
            "it:",
            command,
        )
        return
    explain(
        "Compared by decoder directions only",
        "One command compares their activations on the same tokens, which gives matching, splitting and universality:",
        command,
    )
    try:
        table = cosine_table(page.entry, other)
    except LiveError as error:
        explain("The decoders cannot be compared", str(error))
        return
    shown = pd.DataFrame(
        {
            "feature": table["feature"],
            "fires on": _labels(page.entry, table["feature"]),
            "B": table["cosine_best"],
            "B fires on": _labels(other, table["cosine_best"]),
            "cosine": table["cosine"],
        }
    ).sort_values("cosine", ascending=False, kind="stable")
    left, right = st.columns([0.62, 0.38], gap="medium")
    with left:
        _draw(
            shown,
            page.entry,
            "compare-cosine",
            "For each feature of A: the feature of B with the largest cosine of decoder directions, d_A · d_B / "
            "(‖d_A‖ ‖d_B‖).",
        )
    with right:
        counts, edges = np.histogram(table["cosine"], 40, (-1, 1))
        st.caption(f"Largest decoder cosine with a feature of B; mean {table['cosine'].mean():.3f}")
        bars = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "features": counts})
        st.altair_chart(
            alt.Chart(bars)
            .mark_bar(color=ORANGE)
            .encode(
                x=alt.X("low:Q", bin="binned", axis=alt.Axis(title="cosine")),
                x2="high:Q",
                y="features:Q",
                tooltip=[alt.Tooltip("low:Q", format=".2f"), "features"],
            )
            .properties(height=240),
            key="cosines",
        )
