"""The map: all decoder directions in two dimensions, coloured by a statistic; a click opens the feature."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from browser import state
from browser.components.scatter import Name, Scale, draw_scatter
from browser.markup import explain
from browser.state import Page

LAYOUTS = {"map/umap": "UMAP", "map/pca": "PCA"}
LOGARITHMIC = ("density", "max", "mean", "logit_kurtosis")
HELP = {
    "layout": "UMAP (by cosine of the decoder directions) keeps neighbours together; large distances mean nothing. PCA "
    "projects linearly on the two directions of largest variance, which are a small share of it.",
    "colour": "Any number of the feature table, from its 1st to its 99th percentile; on a logarithmic scale for "
    "density, max, mean and kurtosis.",
    "find": "Part of a token. Features that fire most on such a token stay bright, others fade.",
}
CLUSTER_TOKENS = 3


def show(page: Page) -> None:
    """Draws the map and the settings above it."""
    index = page.index
    layouts = [name for name in LAYOUTS if index.has(name)]
    if not layouts:
        explain(
            "This index has no map",
            "It was built by a version without maps. Build it again:",
            f"sae index {page.entry.path}",
        )
        return
    table = state.table_of(page)
    layout, colour, find, least = st.columns([0.18, 0.26, 0.34, 0.22], vertical_alignment="bottom")
    chosen = layout.segmented_control(
        "Layout",
        layouts,
        format_func=LAYOUTS.__getitem__,
        default=layouts[0],
        required=True,
        key="layout",
        bind="query-params",
        help=HELP["layout"],
    )
    statistics = [name for name in table.columns if name != "feature" and pd.api.types.is_numeric_dtype(table[name])]
    by = colour.selectbox(
        "Colour",
        statistics,
        key="colour",
        bind="query-params",
        help=HELP["colour"],
        format_func=lambda name: name.replace("_", " "),
    )
    text = find.text_input("Find", key="find", bind="query-params", help=HELP["find"], max_chars=60)
    clusters = least.toggle("Name clusters", value=True, key="named", bind="query-params")
    xy = state.panel_of(page, str(chosen))
    dead = (table["flag"] == "dead").to_numpy()
    faint = dead | ~_found(table, text or "")
    values, scale = _colours(table[str(by)].to_numpy(float), str(by), dead)
    draw_scatter(
        xy,
        values,
        faint,
        scale=scale,
        chosen=page.feature,
        height=660,
        key="map",
        on_open=state.open_feature,
        notes=[
            ("fires on", table["top_token"].tolist()),
            ("raises", table["top_logits"].tolist() if "top_logits" in table else [""] * len(table)),
            ("density", [f"{d:.2e}" for d in table["density"]]),
            (str(by).replace("_", " "), [f"{v:.3g}" for v in table[str(by)]]),
        ],
        names=_names(page, xy, table, dead) if clusters else [],
    )
    st.caption(
        f"{len(table):,} features, {int(dead.sum()):,} of them dead (faint). Hover over a feature for details, click "
        "to open it; turn the wheel to zoom, drag to move, double-click for the whole map. Clusters (k-means of the "
        "decoder directions) are named by the tokens that their features fire on more than the rest of the dictionary."
    )


def _found(table: pd.DataFrame, text: str) -> np.ndarray:
    if not text:
        return np.ones(len(table), bool)
    tokens = table["top_token"].str.casefold()
    found: np.ndarray = tokens.str.contains(text.replace(" ", "␣").casefold(), regex=False).to_numpy()
    return found


def _colours(values: np.ndarray, name: str, dead: np.ndarray) -> tuple[np.ndarray, Scale]:
    """Values scaled to 0 … 1 between their 1st and 99th percentile (LOGARITHMIC ones by log₁₀); nan if dead."""
    known = np.isfinite(values) & ~dead
    logarithmic = name in LOGARITHMIC and known.any() and values[known].min() > 0
    seen = np.log10(np.where(known, values, 1.0)) if logarithmic else np.where(known, values, 0.0)
    if not known.any():
        return np.full(len(values), np.nan), Scale(name.replace("_", " "), "–", "–")
    low, high = np.percentile(seen[known], [1, 99])
    shown = np.clip((seen - low) / max(high - low, 1e-12), 0, 1)
    ends = [10**end if logarithmic else end for end in (low, high)]
    title = name.replace("_", " ") + (" (log)" if logarithmic else "")
    return np.where(known, shown, np.nan), Scale(title, f"{ends[0]:.2g}", f"{ends[1]:.2g}")


def _names(page: Page, xy: np.ndarray, table: pd.DataFrame, dead: np.ndarray) -> list[Name]:
    """A name for each cluster, at the median position of its features; clusters in order of their number."""
    cluster = state.panel_of(page, "map/cluster")
    tokens = table["top_token"].to_numpy()
    everywhere = Counter(tokens[~dead].tolist())
    found = []
    for number in range(int(cluster.max()) + 1):
        own = (cluster == number) & ~dead
        if own.sum() >= 4:
            x, y = np.median(xy[own], axis=0)
            found.append(Name(float(x), float(y), "  ".join(_typical(tokens[own].tolist(), everywhere))))
    return found


def _typical(tokens: list[str], everywhere: Counter[str]) -> list[str]:
    """The tokens that name a cluster, best first by count · log(share in the cluster / share in the dictionary)."""
    total = sum(everywhere.values())
    counts = Counter(tokens)

    def score(token: str) -> float:
        lift = counts[token] / len(tokens) * total / everywhere[token]
        return counts[token] * float(np.log(max(lift, 1.0)))

    best: list[Any] = sorted(counts, key=lambda token: (-score(token), token))
    return [token for token in best[:CLUSTER_TOKENS] if token]
