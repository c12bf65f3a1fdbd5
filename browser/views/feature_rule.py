"""Activation specificity: a rule the person states, against where the feature fires."""

from __future__ import annotations

import numpy as np
import streamlit as st

from browser import charts, specificity
from browser.markup import explain, facts
from browser.specificity import KINDS, SCRIPTS, Rule, RuleError, Text
from browser.state import Page

HELP = {
    "regex": "A regular expression on the text, as \\\\d{4}; a token is true if a match touches it. \\\\p{…} works.",
    "alphabet": "Characters, as ACGT or a-zA-Z0-9+/. The rule holds where the text up to the token is likelier under "
    "an even draw from them than under the tokens' own frequencies (the paper's proxy for DNA and base64).",
    "tokens": "Tokens, commas between, ␣ for a space: ␣the,␣The",
}


def show(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    """The form, and the charts once there is a rule."""
    kind_column, text_column = st.columns([0.35, 0.65])
    kind = str(kind_column.selectbox("Rule", KINDS, key="rule", bind="query-params"))
    if kind in ("script", "domain"):
        options = list(SCRIPTS) if kind == "script" else page.index.domains
        text = text_column.selectbox("which", options, key=f"rule_{kind}", bind="query-params") or ""
    else:
        text = text_column.text_input(
            "pattern", key="rule_text", bind="query-params", max_chars=specificity.MAX_PATTERN, help=HELP[kind]
        )
    if not text:
        return
    try:
        holds, score = _truth(
            page.index, _text(page.index, str(page.index.path)), Rule(kind, text), str(page.index.path)
        )
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
    st.html(facts(summary))
    left, right = st.columns(2, gap="medium")
    left.caption("Firings on which the rule holds, by activation")
    left.altair_chart(charts.level_chart(found.levels), key="levels")
    right.caption("Precision, recall and F1 above a threshold")
    right.altair_chart(charts.curve_chart(found.curve), key="curve")


@st.cache_resource(max_entries=2, show_spinner="Reading the index's text …")
def _text(_index: object, path: str) -> Text:
    return specificity.read_text(_index)  # type: ignore[arg-type]


@st.cache_resource(max_entries=8, show_spinner="Trying the rule on every token …")
def _truth(_index: object, _text: Text, rule: Rule, path: str) -> tuple[np.ndarray, np.ndarray]:
    return specificity.truth(_index, _text, rule)  # type: ignore[arg-type]
