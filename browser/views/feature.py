"""One feature: what it fires on, how strongly, and which tokens it promotes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import streamlit as st

from browser import data, dumps, rule_labels
from browser.components import Histogram, draw_histograms
from browser.markup import explain, facts, source_line
from browser.state import Page
from browser.tokens import plain_markdown
from browser.views import (
    feature_circuits,
    feature_dump,
    feature_examples,
    feature_lists,
    feature_notes,
    feature_rule,
    feature_sources,
    feature_text,
)
from browser.views.feature_lists import LOGIT_WEIGHT

SIZES = {"max": "max", "p99": "P99", "mean": "mean"}
WEIGHT_STATISTICS = {
    "delta_loss": "Δloss when active",
    "logit_kurtosis": "logit kurtosis",
    "cos_enc_dec": "cos enc·dec",
    "nearest_cosine": "nearest cos",
}

HELP = {
    "activations": "Histogram of the activations above zero, in equal bins up to the maximum; counts on a logarithmic "
    "scale. Drag over it to see examples from a range.",
    "label": "Found without a language model: the short rule (tokens, the token before, a pair, a domain) that best "
    "predicts where the feature fires, learned on half of the contexts. Precision = firings on which the rule holds / "
    "tokens on which it holds; recall = the same / all firings; F1 = their harmonic mean; all on the other half.",
    "header": "density: firings / kept tokens. max, P99, mean: of the activations above zero. purity: share of the "
    "firings in the main domain. Δloss: mean rise of the next token's loss without the feature, over sampled firings "
    "(nats). logit kurtosis: of its logit weights, high if it moves few tokens. cos enc·dec: cosine of encoder and "
    "decoder direction. nearest cos: largest decoder cosine with another feature. heads: of a dictionary of head "
    "outputs, ‖decoder row of the head‖ / Σ over heads.",
}


def show(page: Page) -> None:
    """Draws the feature `page.feature`."""
    rows, values = page.index.firings(page.feature)
    _header(page)
    feature_notes.show(page, provenance(page))
    if not len(rows):
        _explain_silence(page)
    side, main = st.columns([0.36, 0.64], gap="medium")
    with side:
        _histograms(page, values)
        feature_lists.show(page, rows, values)
        if not page.index.sampled:
            _tools(page, rows, values)
    with main:
        if page.index.sampled:
            feature_dump.show(page)
        elif len(rows):
            feature_examples.show(page, rows, values)


def _explain_silence(page: Page) -> None:
    if str(data.flags(page.index)[page.feature]) == "absent":
        explain(
            f"Feature {page.feature} is not in this dump",
            "The imported feature pages hold neither samples nor a density of this feature.",
        )
    elif page.index.sampled:
        explain(
            f"Feature {page.feature} is silent in all samples", "The data that the imported pages have on it is below."
        )
    else:
        explain(
            f"Feature {page.feature} is dead",
            f"It fires on none of the {page.index.kept_tokens:,} tokens of this index, so there are no activations to "
            "show. Its logit weights and neighbours, which follow from its weights, are below.",
        )


def _tools(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    """Panels that are computed only when opened."""
    if page.entry.has_model:
        text = st.expander("Try a text", key="own-text", on_change="rerun")
        if text.open:
            with text:
                feature_text.show(page)
        circuits = st.expander("In circuits", key="circuits-open", on_change="rerun")
        if circuits.open:
            with circuits:
                feature_circuits.show(page)
    if not len(rows):
        return
    if feature_sources.applies(page):
        sources = st.expander("Where it reads from", key="sources-open", on_change="rerun")
        if sources.open:
            with sources:
                feature_sources.show(page, rows, values)
    specific = st.expander("Activation specificity", key="specificity", on_change="rerun")
    if specific.open:
        with specific:
            feature_rule.show(page, rows, values)


def _header(page: Page) -> None:
    flag = str(data.flags(page.index)[page.feature])
    title = facts(_statistics(page), f"Feature {page.feature:,}", badge=flag, help=HELP["header"])
    st.html(title + _label_line(page) + source_line(provenance(page)))


def _statistics(page: Page) -> dict[str, str]:
    """The statistics of the feature, by the name that the page shows."""
    index, feature = page.index, page.feature
    own = {name: column[feature].item() for name, column in index.stats.items()}
    values = {"density": f"{data.density(index)[feature]:.3g}"}
    if index.sampled:
        values["firings in the samples"] = f"{own['count']:,}"
        values["max"] = f"{np.fmax(own['max'], own['recorded_max']):.3f}"
    else:
        values["firings"] = f"{own['count']:,}"
        values |= {title: f"{own[name]:.3f}" for name, title in SIZES.items()}
        if own["domain_top"] >= 0:
            values["purity"] = f"{own['domain_purity']:.0%} {index.domains[own['domain_top']]}"
    for name, title in WEIGHT_STATISTICS.items():
        if name in own and np.isfinite(own[name]):
            values[title] = f"{own[name]:.3f}"
    if index.has("heads/share"):
        shares = index.panel("heads/share", feature)
        strongest = np.argsort(-shares, kind="stable")[:3].tolist()
        values["heads"] = ", ".join(f"{head} ({shares[head]:.0%})" for head in strongest)
    if own.get("resampled_step", -1) >= 0:
        values["resampled at step"] = f"{own['resampled_step']:,}"
    return values


def _label_line(page: Page) -> str:
    """The label found without a language model, with its held-out scores."""
    found = rule_labels.auto_label(page.index, page.feature)
    if found is None:
        return ""
    values = {
        f"label by rule ({found.kind})": found.text,
        "held-out F1": f"{found.f1:.2f}",
        "precision": f"{found.precision:.2f}",
        "recall": f"{found.recall:.2f}",
    }
    return facts(values, help=HELP["label"])


def provenance(page: Page) -> str:
    """One line: the dictionary, model, hook point and text that the numbers come from."""
    attributes = page.index.attributes
    model = attributes.get("model") or {}
    name = model.get("id", "?") if isinstance(model, dict) else model
    recipe = page.entry.config.get("recipe", "?")
    if page.index.sampled:
        imported = page.entry.config.get("imported") or {}
        return (
            f"{page.entry.id} · {recipe}, imported from {imported.get('files', '?')} files · "
            f"{'unknown model' if name == '?' else name} "
            f"{attributes.get('hook_point', '')} · {page.index.kept_tokens:,} tokens of sampled text"
        )
    return (
        f"{page.entry.id} · {recipe} · {page.index.d_sae:,} features · {name} "
        f"{attributes.get('hook_point', '')} · {page.index.kept_tokens:,} tokens in "
        f"{page.index.n_contexts:,} contexts of {page.index.seq_len}"
    )


def _histograms(page: Page, values: np.ndarray) -> None:
    """Draws the activations and the logit weights; imported histograms cannot be dragged over."""
    if page.index.sampled:
        acts, logits = (dumps.histogram(page.index, kind, page.feature) for kind in ("act", "logit"))
        charts = [
            _histogram("range", acts, "Activations", "firings", "The histogram of the imported pages.", log=True),
            _histogram("weights", logits, "Logit weights", "tokens", LOGIT_WEIGHT, split=True),
        ]
        draw_histograms([chart for chart in charts if chart.bars], key="histograms", on_range=lambda *_: None)
        return
    acts, logits = data.activation_histogram(values), pd.DataFrame()
    if page.index.has("logits/histogram"):  # not where activations came without a model
        logits = data.logit_histogram(page.index, page.feature)
    help_ = LOGIT_WEIGHT + " Drag over the histogram to see firings that such tokens follow."
    charts = [
        _histogram("range", acts, "Activations", "firings", HELP["activations"], log=True),
        _histogram("weights", logits, "Logit weights", "tokens", help_, split=True),
    ]
    ranges = {name: feature_examples.parse_range(st.session_state.get(name, "")) for name in ("range", "weights")}
    charts = [replace(chart, chosen=ranges[chart.which]) for chart in charts if chart.bars]
    draw_histograms(charts, key="histograms", on_range=_ranged)
    if reason := page.index.attributes.get("no_logit_weights"):
        st.caption("No logit weights: " + plain_markdown(str(reason)))


def _histogram(
    which: str, frame: pd.DataFrame, title: str, counted: str, help: str, *, log: bool = False, split: bool = False
) -> Histogram:
    bars = list(frame.itertuples(index=False, name=None))
    return Histogram(which, title, bars, counted, help, log=log, split=split)


def _ranged(which: str, low: float | None, high: float | None) -> None:
    """Writes a range that was dragged over a histogram into the box of the same name, and so into the URL."""
    if which in ("range", "weights"):
        st.session_state[which] = "" if low is None or high is None else f"{low:.4g}…{high:.4g}"
