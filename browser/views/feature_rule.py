"""Activation specificity: how well a rule that you state describes where the feature fires."""

from __future__ import annotations

import numpy as np
import streamlit as st

from browser import charts, specificity
from browser.markup import explain, facts
from browser.specificity import KINDS, SCRIPTS, Rule, RuleError, Text
from browser.state import Page
from store.features import FeatureIndex

HELP = {
    "regex": "A regular expression on the text, e.g. \\\\d{4}. The rule holds on each token that a match touches. "
    "\\\\p{…} is supported.",
    "alphabet": "Characters, e.g. ACGT or a-zA-Z0-9+/. The rule holds if the text up to the token is more likely under "
    "uniform draws from these characters than under the tokens' frequencies (the proxy of Bricken et al. 2023 for DNA "
    "and base64).",
    "tokens": "Tokens, separated by commas, with ␣ for a space: ␣the,␣The",
    "measures": "Precision = firings on which the rule holds / firings above the threshold. Recall = the same / "
    "tokens on which the rule holds. F1 = 2 · precision · recall / (precision + recall). Pearson: correlation of the "
    "activation with log P(text | rule) / P(text), the proxy of Bricken et al. 2023, over all kept tokens.",
}


def show(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    """Draws the form, and the charts for a rule."""
    kind_column, text_column = st.columns([0.35, 0.65])
    kind = str(kind_column.selectbox("Rule", KINDS, key="rule", bind="query-params"))
    if kind in ("script", "domain"):
        options = list(SCRIPTS) if kind == "script" else page.index.domains
        text = text_column.selectbox("Which", options, key=f"rule_{kind}", bind="query-params") or ""
    else:
        text = text_column.text_input(
            "Pattern", key="rule_text", bind="query-params", max_chars=specificity.MAX_PATTERN, help=HELP[kind]
        )
    if not text:
        return
    path = str(page.index.path)
    try:
        holds, score = _truth(page.index, _text(page.index, path), Rule(kind, text), path)
    except RuleError as error:
        explain("This rule cannot be used", str(error))
        return
    found = specificity.measure(page.index, rows, values, holds, score)
    summary = {
        "rule holds on": f"{found.base:.3%} of tokens",
        "and on": f"{float(holds[rows].mean()):.2%} of the firings",
        "best F1": f"{found.curve['f1'].max():.3f}",
        "Pearson with the proxy": f"{found.pearson:.3f}",
    }
    st.html(facts(summary, help=HELP["measures"]))
    left, right = st.columns(2, gap="medium")
    left.caption("Share of firings on which the rule holds, by activation")
    left.altair_chart(charts.level_chart(found.levels), key="levels")
    right.caption("Precision, recall and F1 of “activation > threshold”", help=HELP["measures"])
    right.altair_chart(charts.curve_chart(found.curve), key="curve")


@st.cache_resource(max_entries=2, show_spinner="Reading the text of the index …")
def _text(_index: FeatureIndex, path: str) -> Text:
    return specificity.read_text(_index)


@st.cache_resource(max_entries=8, show_spinner="Applying the rule to every token …")
def _truth(_index: FeatureIndex, _text: Text, rule: Rule, path: str) -> tuple[np.ndarray, np.ndarray]:
    return specificity.truth(_index, _text, rule)
