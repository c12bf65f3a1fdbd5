"""One feature: what it fires on, how strongly, and which tokens it promotes."""

from __future__ import annotations

import numpy as np
import streamlit as st

from browser import comparison, data, dumps, state
from browser.components import Histogram, Row, RowList, draw_histograms, draw_lists
from browser.markup import explain, facts, source_line
from browser.state import Page
from browser.tokens import label
from browser.views import feature_dump, feature_examples, feature_notes, feature_rule, feature_text

N_LIST = 10
SIZES = {"max": "max", "p99": "P99", "mean": "mean"}

HELP = {
    "activations": "Histogram of the activations above zero, in equal bins up to the maximum; counts on a logarithmic "
    "scale. Drag over it to see examples from a range.",
    "logits": "Logit weight of a token = (decoder direction in the residual stream, its mean removed, × the final "
    "norm's scale) · W_U: what one unit of activation adds to the token's logit by the direct path, up to the norm's "
    "1/σ. Shifted so that the median token is at 0. Drag over the histogram to see firings that such tokens follow.",
    "weight": "Neurons with the largest |decoder weight| w. The percentage is |w| / Σ|w|.",
    "pearson": "Pearson correlation of the feature's activation with the neuron's, over all kept tokens of the index.",
    "neighbours": "Features of this dictionary with the largest cosine of decoder directions, d₁ · d₂ / (‖d₁‖ ‖d₂‖).",
    "correlated": "Features with the largest Pearson correlation of activations over the index, estimated from up to "
    "256 of this feature's firings.",
    "together": "Jaccard index = tokens on which both fire / tokens on which either fires, from up to 256 of this "
    "feature's firings.",
    "successors": "Features likely to fire on the next token: the share of this feature's next tokens on which they "
    "fire, and that share / their density. Chains of these are the finite-state automata of Bricken et al. 2023.",
    "others": "The feature of each other dictionary with the largest Pearson correlation of activations on the same "
    "text. Shown for dictionaries that `sae compare` has compared with this one.",
    "samples": "The imported pages hold only some firings of each feature, so this is a share of the samples; recall "
    "is unknown.",
    "tokens": "Precision = firings on the token / all firings of the feature. Recall = firings on the token / "
    "occurrences of the token.",
    "label": "Found without a language model: the short rule (tokens, the token before, a pair, a domain) that best "
    "predicts where the feature fires, learned on half of the contexts. Precision = firings on which the rule holds / "
    "tokens on which it holds; recall = the same / all firings; F1 = their harmonic mean; all on the other half.",
    "header": "density: firings / kept tokens. max, P99, mean: of the activations above zero. purity: share of the "
    "firings in the main domain. Δloss: mean rise of the next token's loss without the feature, over sampled firings "
    "(nats). logit kurtosis: of its logit weights, high if it moves few tokens. cos enc·dec: cosine of encoder and "
    "decoder direction. nearest cos: largest decoder cosine with another feature.",
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
        _lists(page, rows, values)
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
            "The imported feature pages have neither samples nor a density of it.",
        )
    elif page.index.sampled:
        explain(f"Feature {page.feature} is silent in all samples", "What the imported pages say about it is below.")
    else:
        explain(
            f"Feature {page.feature} is dead",
            f"It fires on none of the {page.index.kept_tokens:,} tokens of this index, so there are no activations to "
            "show. What its weights say is below.",
        )


def _tools(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    """Panels that are computed only when opened."""
    text = st.expander("Try a text", key="own-text", on_change="rerun")
    if text.open:
        with text:
            feature_text.show(page)
    if not len(rows):
        return
    specific = st.expander("Activation specificity", key="specificity", on_change="rerun")
    if specific.open:
        with specific:
            feature_rule.show(page, rows, values)


def _header(page: Page) -> None:
    stats, feature, index = page.index.stats, page.feature, page.index
    flag = str(data.flags(index)[feature])
    domain = int(stats["domain_top"][feature])
    values = {"density": f"{data.density(index)[feature]:.3g}"}
    if index.sampled:
        values["firings in the samples"] = f"{int(stats['count'][feature]):,}"
        values["max"] = f"{np.fmax(stats['max'], stats['recorded_max'])[feature]:.3f}"
    else:
        values["firings"] = f"{int(stats['count'][feature]):,}"
        values |= {title: f"{stats[name][feature]:.3f}" for name, title in SIZES.items()}
    if domain >= 0 and not index.sampled:
        share = f"{stats['domain_purity'][feature]:.0%}"
        values["purity"] = f"{share} {index.domains[domain]}"
    for name, title in (("delta_loss", "Δloss when active"), ("logit_kurtosis", "logit kurtosis")):
        if name in stats and np.isfinite(stats[name][feature]):
            values[title] = f"{stats[name][feature]:.3f}"
    for name, title in (("cos_enc_dec", "cos enc·dec"), ("nearest_cosine", "nearest cos")):
        if name in stats:
            values[title] = f"{stats[name][feature]:.3f}"
    if "resampled_step" in stats and stats["resampled_step"][feature] >= 0:
        values["resampled at step"] = f"{stats['resampled_step'][feature]:,}"
    st.html(
        facts(values, f"Feature {feature:,}", badge=flag, help=HELP["header"])
        + _label_line(page)
        + source_line(provenance(page))
    )


def _label_line(page: Page) -> str:
    """The label found without a language model, with its held-out scores."""
    found = data.auto_label(page.index, page.feature)
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
    sampled, ranges = page.index.sampled, {}
    if sampled:
        acts, logits = (dumps.histogram(page.index, kind, page.feature) for kind in ("act", "logit"))
    else:
        acts, logits = data.activation_histogram(values), data.logit_histogram(page.index, page.feature)
        ranges = {name: feature_examples.parse_range(st.session_state.get(name, "")) for name in ("range", "weights")}
    charts = []
    if len(acts):
        help_ = "The histogram of the imported pages." if sampled else HELP["activations"]
        charts.append(
            Histogram(
                "range",
                "Activations",
                list(acts.itertuples(index=False, name=None)),
                "firings",
                help_,
                log=True,
                chosen=ranges.get("range"),
            )
        )
    if len(logits):
        charts.append(
            Histogram(
                "weights",
                "Logit weights",
                list(logits.itertuples(index=False, name=None)),
                "tokens",
                HELP["logits"],
                split=True,
                chosen=ranges.get("weights"),
            )
        )
    draw_histograms(charts, key="histograms", on_range=(lambda *_: None) if sampled else _ranged)


def _ranged(which: str, low: float | None, high: float | None) -> None:
    """Writes a range that was dragged over a histogram into the box of the same name, and so into the URL."""
    if which in ("range", "weights"):
        st.session_state[which] = "" if low is None or high is None else f"{low:.4g}…{high:.4g}"


def _lists(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    index, feature = page.index, page.feature
    lists = [
        _logit_list(page, side, title)
        for side, title in (("top", "Raises"), ("bottom", "Lowers"))
        if index.has(f"logits/{side}_id")
    ]
    if len(rows):
        lists.append(_token_list(page, rows, values))
    for name, score, title in (
        ("successors", "share", "Fires next"),
        ("neighbours", "cosine", "Similar direction"),
        ("correlated", "pearson", "Similar activations"),
        ("together", "jaccard", "Fires together"),
    ):
        if index.has(f"{name}/id"):
            lists.append(RowList(title, _feature_rows(page, name, score), HELP[name], empty="none found"))
    if index.has("neurons/weight_id"):
        ids, weights = (index.panel(f"neurons/weight_{column}", feature) for column in ("id", "value"))
        known = index.has("neurons/weight_share")
        shares = index.panel("neurons/weight_share", feature) if known else np.abs(weights) / np.nansum(np.abs(weights))
        rows_ = [
            Row(f"neuron {i}", f"{weight:+.3f}", share * 5, f"{share:.1%}" if known else "", negative=weight < 0)
            for i, weight, share in zip(ids.tolist(), weights.tolist(), shares.tolist(), strict=True)
            if i >= 0
        ]
        lists.append(RowList("Aligned neurons", rows_, HELP["weight"]))
    if index.has("neurons/corr_id"):
        ids, values_ = (index.panel(f"neurons/corr_{column}", feature).tolist() for column in ("id", "value"))
        rows_ = [Row(f"neuron {i}", f"{r:+.3f}", abs(r), negative=r < 0) for i, r in zip(ids, values_, strict=True)]
        lists.append(RowList("Correlated neurons", rows_, HELP["pearson"]))
    draw_lists(lists, key="lists", two=True, on_open=state.open_feature)
    _elsewhere(page)


def _elsewhere(page: Page) -> None:
    """The feature's best partner in each dictionary that was compared with this one."""
    found = []
    for name, other in page.entries.items():
        compared = state.comparison_of(page.entry, other) if name != page.entry.id else None
        if compared is not None:
            best, correlation = comparison.partner(compared, page.feature)
            if best is not None:
                found.append((name, other, best, correlation))
    if not found:
        return
    rows = [
        Row(f"{state.fires_on(other, best)}  {name}", f"{correlation:.3f}", correlation, prefix=str(best), open=number)
        for number, (name, other, best, correlation) in enumerate(found)
    ]
    draw_lists(
        [RowList("In other dictionaries", rows, HELP["others"])],
        key="elsewhere",
        on_open=lambda number: state.open_feature_of(found[number][0], found[number][2]),
    )


def _logit_list(page: Page, side: str, title: str) -> RowList:
    found = data.logit_weights(page.index, side, page.feature, N_LIST)
    most = max((abs(weight) for _, weight in found), default=1.0) or 1.0
    rows = [
        Row(label(page.index.token_bytes(i)), f"{weight:+.2f}", abs(weight) / most, negative=side == "bottom")
        for i, weight in found
    ]
    return RowList(title, rows, HELP["logits"])


def _token_list(page: Page, rows: np.ndarray, values: np.ndarray) -> RowList:
    shares = data.token_shares(page.index, rows, values, N_LIST)
    sampled = page.index.sampled
    shown = [
        Row(
            label(page.index.token_bytes(each.token_id)),
            f"{each.share:.1%}",
            each.share,
            "" if sampled else f"{each.recall:.0%}",
        )
        for each in shares
    ]
    if sampled:
        return RowList("Fires on, share of the samples", shown, HELP["samples"], "orange")
    return RowList("Fires on: precision, recall", shown, HELP["tokens"], "orange")


def _feature_rows(page: Page, name: str, score: str) -> list[Row]:
    """Rows of the panel `name`, each with what that feature fires on most."""
    ids, scores = (page.index.panel(f"{name}/{column}", page.feature).tolist() for column in ("id", score))
    lifts = page.index.panel("successors/lift", page.feature).tolist() if name == "successors" else [None] * len(ids)
    top = page.index.stats["top_token"]
    return [
        Row(
            label(page.index.token_bytes(int(top[i]))) if top[i] >= 0 else "dead",
            f"{value:.0%}" if name == "successors" else f"{value:+.3f}",
            abs(value),
            "" if lift is None else f"×{lift:.3g}",
            prefix=str(i),
            negative=value < 0,
            open=i,
        )
        for i, value, lift in zip(ids, scores, lifts, strict=True)
        if i >= 0
    ]
