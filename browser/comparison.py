"""Reads what `sae compare` wrote about two dictionaries; no Streamlit here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from browser.data import SaeEntry, read_config

PAPER = {"features_a_to_b": 0.72, "neurons_a_to_b": 0.46}  # mean correlations of A/1 with B/1 in Bricken et al. 2023


@dataclass(frozen=True)
class Comparison:
    """A's features against B's: `a` and `b` have one row per feature; `flipped` if it was written as B against A."""

    summary: dict[str, Any]
    a: pd.DataFrame
    b: pd.DataFrame
    edges: pd.DataFrame
    flipped: bool


def folder_of(a: SaeEntry, b: SaeEntry) -> Path:
    """Where `sae compare A B` writes."""
    return a.path / "compare" / f"{b.path.parent.name}--{b.path.name}"


def find(a: SaeEntry, b: SaeEntry) -> Comparison | None:
    """The comparison of A with B, or that of B with A with its sides swapped; None if neither is readable."""
    for first, second, flipped in ((a, b, False), (b, a, True)):
        folder = folder_of(first, second)
        summary = read_config(folder / "compare.json")
        if summary.get("kind") != "comparison" or summary.get("format") != 1:
            continue
        try:
            of_first, of_second, edges = (
                pd.read_parquet(folder / f"{name}.parquet") for name in ("features_a", "features_b", "edges")
            )
        except (OSError, ValueError):
            continue
        if (len(of_first), len(of_second)) != (first.d_sae, second.d_sae):
            continue  # one of the dictionaries was trained again since
        if flipped:
            edges = edges.rename(columns={"a": "b", "b": "a", "masked_a": "masked_b", "masked_b": "masked_a"})
            return Comparison(summary, of_second, of_first, edges, True)
        return Comparison(summary, of_first, of_second, edges, False)
    return None


def histograms(found: Comparison) -> pd.DataFrame:
    """Histograms of the best correlations in 40 bins over −1 … 1: low, high, share, what."""
    names = {"features": "correlation", "shuffled tokens": "shuffled_correlation", "neurons of A": "neuron_correlation"}
    edges = np.linspace(-1, 1, 41)
    parts = []
    for what, column in names.items():
        values = found.a[column].dropna().to_numpy(float)
        counts = np.histogram(values, edges)[0] / max(1, len(values))
        parts.append(pd.DataFrame({"low": edges[:-1], "high": edges[1:], "share": counts, "what": what}))
    return pd.concat(parts)


def splits(found: Comparison, least: float) -> pd.DataFrame:
    """Features of A that split: several in B have a masked correlation of at least `least`. Most children first."""
    strong = found.edges[found.edges["masked"] >= least]
    grouped = strong.groupby("a", sort=True)
    table = pd.DataFrame(
        {
            "feature": list(grouped.groups),
            "into": grouped.size().to_numpy(),
            "children": [" ".join(str(b) for b in part["b"].head(12)) for _, part in grouped],
            "masked": grouped["masked"].max().to_numpy(),
        }
    )
    return table[table["into"] > 1].sort_values(["into", "masked"], ascending=False, kind="stable")


def partner(found: Comparison, feature: int) -> tuple[int | None, float]:
    """The feature of B that correlates best with a feature of A, and the correlation; None if it was not analysed."""
    row = found.a.iloc[feature]
    if row["best"] != row["best"] or row["correlation"] != row["correlation"]:
        return None, float("nan")
    return int(row["best"]), float(row["correlation"])


def children(found: Comparison, feature: int, least: float) -> pd.DataFrame:
    """The features of B whose masked correlation with a feature of A is at least `least`, strongest first."""
    edges = found.edges
    return edges[(edges["a"] == feature) & (edges["masked"] >= least)].sort_values("masked", ascending=False)
