"""One token: the features that fire on it, those that fire just before it, and those that raise its logit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from browser import data, state
from browser.components import Row, RowList, draw_lists
from browser.markup import explain, facts
from browser.state import Page
from browser.tokens import label
from store.common import StoreError

LISTS = {"on": "Fire on it", "before": "Fire just before it", "raise": "Raise its logit"}
HELP = {
    "on": "precision = firings on this token / all firings of the feature. recall = firings on this token / its "
    "occurrences. F1 = 2 · precision · recall / (precision + recall).",
    "before": "Features that predict this token in the indexed text. precision = firings that this token follows / all "
    "firings of the feature. recall = the same / occurrences of the token. lift = precision / the token's share of all "
    "kept tokens.",
    "others": "Other tokens that contain this text, most frequent first. The number on the left is the token id. "
    "Click a token to choose it.",
    "raise": "Features that have this token among the twenty with their largest logit weights (direction · W_U, direct "
    "path, median token at 0). The other columns say how often the token then follows.",
}
SORTS = {"f1": "F1", "precision": "precision", "recall": "recall", "mean": "mean activation"}
SUGGESTED = 12


def show(page: Page) -> None:
    """Draws the token's search and the three lists."""
    text, which, sort, least = st.columns([0.3, 0.4, 0.16, 0.14], vertical_alignment="bottom")
    wanted = text.text_input(
        "Token",
        " the",
        key="token",
        bind="query-params",
        max_chars=60,
        help="The token exactly as in the text: a leading space counts. #123 is the token with id 123.",
    )
    chosen = which.segmented_control(
        "Features that",
        list(LISTS),
        format_func=LISTS.__getitem__,
        default="on",
        required=True,
        key="list",
        bind="query-params",
    )
    by = sort.selectbox("Sort by", list(SORTS), format_func=SORTS.__getitem__, key="tokensort", bind="query-params")
    few = least.number_input("Firings, at least", 1, 10_000, 5, key="least", bind="query-params")
    token_id, others = find_token(page, wanted or "")
    if token_id is None:
        _suggest(page, wanted or "", others)
        return
    _facts(page, token_id)
    try:
        table = TABLES[str(chosen)](page, token_id)
    except StoreError as error:
        again = "" if "no_logit_weights" in page.index.attributes else f"sae index {page.entry.path}"
        explain("This index lacks this list", str(error), again)
        return
    table = table[table["firings"] >= few]
    if by in table:
        table = table.sort_values(str(by), ascending=False, kind="stable")
    left, right = st.columns([0.76, 0.24], gap="medium")
    with left:
        _draw(table, str(chosen))
    with right:
        if others:
            _others(page, others)


def find_token(page: Page, text: str) -> tuple[int | None, list[int]]:
    """The id of the token that is exactly `text` (or #id), and ids of others that contain it, most frequent first."""
    if text.startswith("#") and text[1:].isdecimal() and int(text[1:]) < page.index.d_vocab:
        return int(text[1:]), []
    raw = text.encode()
    ids = range(page.index.d_vocab)
    exact = next((i for i in ids if page.index.token_bytes(i) == raw), None) if raw else None
    needle = raw.strip().lower()
    containing = [i for i in ids if needle and needle in page.index.token_bytes(i).lower() and i != exact]
    counts = page.index.token_counts
    return exact, sorted(containing, key=lambda i: (-int(counts[i]), i))[:SUGGESTED]


def _choose(token_id: int) -> None:
    st.session_state["token"] = f"#{token_id}"


def _suggest(page: Page, text: str, others: list[int]) -> None:
    explain(
        f"No token is exactly “{text}”",
        "A word may be several tokens, and most words begin with a space. These tokens contain it:"
        if others
        else "No token of the vocabulary contains it.",
    )
    if others:
        _others(page, others)


def _others(page: Page, ids: list[int]) -> None:
    counts = page.index.token_counts
    most = max(1, *(int(counts[i]) for i in ids))
    rows = [
        Row(label(page.index.token_bytes(i)), f"{counts[i]:,}", int(counts[i]) / most, prefix=str(i), open=i)
        for i in ids
    ]
    draw_lists([RowList("Tokens that contain it", rows, HELP["others"])], key="other-tokens", on_open=_choose)


def _facts(page: Page, token_id: int) -> None:
    count = int(page.index.token_counts[token_id])
    values = {
        "id": str(token_id),
        "occurs": f"{count:,}",
        "of all tokens": f"{count / max(1, page.index.kept_tokens):.3%}",
        "bytes": page.index.token_bytes(token_id).hex(" "),
    }
    st.html(facts(values, f"Token {label(page.index.token_bytes(token_id))}"))


def _counted(page: Page, token_id: int, feature: np.ndarray, count: np.ndarray, total: np.ndarray) -> pd.DataFrame:
    """Precision, recall and F1 of features as detectors of the token."""
    firings = page.index.stats["count"][feature].astype(np.int64)
    occurs = max(1, int(page.index.token_counts[token_id]))
    precision, recall = count / np.maximum(1, firings), count / occurs
    return pd.DataFrame(
        {
            "feature": feature,
            "fires on": [state.token_label(page.index, int(f)) for f in feature],
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / np.maximum(precision + recall, 1e-12),
            "together": count.astype(np.int64),
            "mean": total / np.maximum(1, count),
            "firings": firings,
            "density": data.density(page.index)[feature],
        }
    )


def firing_on(page: Page, token_id: int) -> pd.DataFrame:
    """The features that fire on the token."""
    feature, count, total, _ = page.index.features_of_token(token_id)
    return _counted(page, token_id, feature, count, total)


def firing_before(page: Page, token_id: int) -> pd.DataFrame:
    """The features that fire just before the token. Raises StoreError if the index lacks this list."""
    feature, count, total, _ = page.index.features_before_token(token_id)
    table = _counted(page, token_id, feature, count, total)
    share = int(page.index.token_counts[token_id]) / max(1, page.index.kept_tokens)
    table.insert(5, "lift", table["precision"] / max(share, 1e-12))
    return table


def raising(page: Page, token_id: int) -> pd.DataFrame:
    """The features that raise the token most, and how often it then follows. Raises StoreError without logits."""
    if reason := page.index.attributes.get("no_logit_weights"):
        raise StoreError(str(reason))
    ids, weights = page.index.column("logits/top_id"), page.index.column("logits/top_value")
    feature, place = np.nonzero(ids == token_id)
    before, count, total, _ = page.index.features_before_token(token_id)
    at = np.searchsorted(before, feature)
    known = (at < len(before)) & (before[np.minimum(at, max(0, len(before) - 1))] == feature) if len(before) else at < 0
    counts, totals = np.zeros(len(feature), np.int64), np.zeros(len(feature))
    counts[known], totals[known] = count[at[known]], total[at[known]]
    table = _counted(page, token_id, feature, counts, totals)
    table.insert(2, "logit weight", weights[feature, place])
    table.insert(3, "rank", place + 1)
    return table.sort_values("logit weight", ascending=False, kind="stable")


TABLES = {"on": firing_on, "before": firing_before, "raise": raising}


def _draw(table: pd.DataFrame, chosen: str) -> None:
    if table.empty:
        explain("No feature is in this list", "Lower the minimum number of firings, or choose another list.")
        return
    numbers = table["feature"].to_numpy()

    def opened() -> None:
        rows = st.session_state[f"token-table-{chosen}"]["selection"]["rows"]
        if rows and rows[0] < len(numbers):
            state.open_feature(int(numbers[rows[0]]))

    number, share = st.column_config.NumberColumn, st.column_config.ProgressColumn
    shares = {name: share(name, format="%.3f", min_value=0, max_value=1, width=120) for name in ("precision", "recall")}
    st.dataframe(
        table,
        key=f"token-table-{chosen}",
        height=560,
        row_height=27,
        hide_index=True,
        lazy=False,
        on_select=opened,
        selection_mode="single-row",
        column_config={
            **shares,
            "feature": number("feature", format="%d", width=70, pinned=True),
            "f1": share("F1", format="%.3f", min_value=0, max_value=1, width=120),
            "mean": number("mean activation", format="%.2f", width=112),
            "lift": number("lift", format="%.1f", width=70),
            "logit weight": number("logit weight", format="%.2f", width=94),
            "together": number(
                "together", format="%d", width=76, help="firings counted: on the token, or just before it"
            ),
            "density": number("density", format="%.1e", width=76),
        },
    )
    st.caption(f"{len(table):,} features. Select a row to open its feature.", help=HELP[chosen])
