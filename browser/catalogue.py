"""A dictionary as a table of its features, and the filters on it; no Streamlit here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from browser.data import density, flags
from browser.rule_labels import LABEL_KINDS, rule_text
from browser.tokens import label
from store.features import FeatureIndex
from store.notes import Note

FLAGS = ("alive", "dead", "ultra-low", "dense", "absent")
TEXT_COLUMNS = ("label", "auto_label", "top_token", "top_logits", "domain")


def feature_table(index: FeatureIndex) -> pd.DataFrame:
    """One row per feature: every statistic of the index, with tokens as visible labels."""
    stats = index.stats

    def token(number: int) -> str:
        return label(index.token_bytes(number)) if number >= 0 else ""

    columns: dict[str, Any] = {
        "feature": np.arange(index.d_sae),
        "flag": flags(index),
        "density": density(index),
        "max": stats["max"],
    }
    if index.sampled:
        columns["max"] = np.fmax(stats["max"], stats["recorded_max"])
        columns["samples"] = stats["count"]
    else:
        columns["mean"] = stats["mean"]
    columns["top_token"] = [token(t) for t in stats["top_token"].tolist()]
    columns["top_token_share"] = stats["top_token_share"]
    if index.has("logits/top_id"):
        ids = index.column("logits/top_id")[:, :5].tolist()
        columns["top_logits"] = ["  ".join(filter(None, map(token, row))) for row in ids]
    if not index.sampled:
        columns["domain"] = [index.domains[d] if d >= 0 else "" for d in stats["domain_top"].tolist()]
        columns["domain_purity"] = stats["domain_purity"]
    for name in ("delta_loss", "logit_kurtosis", "cos_enc_dec", "nearest_cosine"):
        if name in stats:
            columns[name] = stats[name]
    if "resampled_step" in stats:
        columns["resampled_step"] = pd.Series(stats["resampled_step"], dtype="Int32").where(lambda step: step >= 0)
    if index.has("label/kind"):
        kinds, keys = index.column("label/kind").tolist(), index.column("label/keys")
        columns["auto_label"] = [
            rule_text(index, LABEL_KINDS[kind], key) if kind >= 0 else "" for kind, key in zip(kinds, keys, strict=True)
        ]
        columns["auto_f1"] = index.column("label/score")[:, 2]
    return pd.DataFrame(columns)


def with_labels(table: pd.DataFrame, notes: Iterable[Note]) -> pd.DataFrame:
    """The table with your own labels as its second column, if there are any."""
    labels = {note.feature: note.label for note in notes if note.label}
    if not labels:
        return table
    table = table.copy(deep=False)
    table.insert(1, "label", [labels.get(feature, "") for feature in table["feature"].tolist()])
    return table


def select_features(
    table: pd.DataFrame,
    *,
    flag: str = "",
    domain: str = "",
    log_density: tuple[float, float] | None = None,
    text: str = "",
    features: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Rows of `feature_table` that pass every filter; `text` is searched for in tokens, labels and domains.

    `flag` is "" (any), "alive" or one of the flags; `log_density` are bounds on log₁₀ density, which exclude features
    that never fire; `features` are the only ones that pass.
    """
    keep = np.ones(len(table), bool)
    if flag == "alive":
        keep &= ~table["flag"].isin(["dead", "absent"]).to_numpy()
    elif flag:
        keep &= (table["flag"] == flag).to_numpy()
    if domain:
        keep &= (table["domain"] == domain).to_numpy()
    if log_density is not None:
        share = table["density"].to_numpy()
        low, high = 10.0 ** log_density[0], 10.0 ** log_density[1]
        keep &= (share >= low) & (share <= high)
    if features is not None:
        keep &= table["feature"].isin(features).to_numpy()
    if text:
        needle = label(text.encode()).casefold()
        hit = np.zeros(len(table), bool)
        for name in TEXT_COLUMNS:
            if name in table:
                hit |= table[name].str.casefold().str.contains(needle, regex=False).to_numpy()
        keep &= hit
    return table[keep]


def by_similarity(table: pd.DataFrame, similarity: np.ndarray) -> pd.DataFrame:
    """The table with each feature's `similarity` [d_sae] as its second column, the largest first, without those of
    nan."""
    found = table.copy(deep=False)
    found.insert(1, "similarity", similarity[table["feature"].to_numpy()])
    return found.dropna(subset="similarity").sort_values("similarity", ascending=False, kind="stable")


def to_csv(table: pd.DataFrame) -> bytes:
    """The table as UTF-8 CSV. Text cells are JSON strings, so that no spreadsheet runs one as a formula."""
    safe = table.copy()
    for name in TEXT_COLUMNS:
        if name in safe:
            safe[name] = [json.dumps(cell, ensure_ascii=False) for cell in safe[name]]
    text: str = safe.to_csv(index=False)
    return text.encode()
