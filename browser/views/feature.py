"""One feature: what it fires on, how strongly, and what it writes."""

from __future__ import annotations

import html

import numpy as np
import streamlit as st

from browser import charts, data, state
from browser.components import Group, Row, RowList, draw_examples, draw_lists
from browser.state import Page
from browser.tokens import label

CONTEXTS = {"short": (10, 6), "medium": (22, 12), "whole": (1 << 20, 1 << 20)}
N_TOP, PER_INTERVAL, N_LIST = 20, 5, 10

HELP = {
    "activations": "Firings (activations above zero) in equal bins up to the maximum. Zeros are "
    "left out; counts are on a logarithmic scale.",
    "logits": "Logit weight of a token: (decoder direction in the residual stream, mean removed, "
    "times the final norm's scale) · W_U. What the feature adds to that token's logit, up to the "
    "norm's 1/σ, for each unit of activation; shifted so that the median token is at 0.",
    "examples": "Orange is the activation on that token, in proportion to this feature's maximum. "
    "Top activations show one example for each context. The intervals divide (0, max] into eleven "
    "equal parts, each half-open (low, high], with examples drawn uniformly inside; "
    "the number beside the dice is the seed of that draw.",
    "weight": "Neurons with the largest decoder weights, and each one's share of Σ|w|.",
    "pearson": "Pearson correlation of the feature's activation with a neuron's, over all kept tokens of the index.",
    "neighbours": "Features of this dictionary by cosine of the decoder directions.",
    "tokens": "Share of this feature's firings that are on the token, and the mean activation there.",
}


def show(page: Page) -> None:
    """Draws the feature `page.feature`."""
    rows, values = page.index.firings(page.feature)
    _header(page)
    if not len(rows):
        state.explain(
            f"Feature {page.feature} is dead",
            f"It fires on none of the {page.index.kept_tokens:,} tokens of this index, so there "
            "are no activations to show. What its weights say is below.",
        )
    side, main = st.columns([0.36, 0.64], gap="medium")
    with side:
        _histograms(page, values)
        _logits(page)
        _lists(page, rows, values)
    with main:
        if len(rows):
            _examples(page, rows, values)
    st.html(f'<i id="done" data-feature="{page.feature}"></i>')


def _header(page: Page) -> None:
    stats, feature, index = page.index.stats, page.feature, page.index
    flag = str(data.flags(index)[feature])
    domain = int(stats["domain_top"][feature])
    facts = {
        "density": f"{data.density(index)[feature]:.3g}",
        "firings": f"{int(stats['count'][feature]):,}",
        "max": f"{stats['max'][feature]:.3f}",
        "P99": f"{stats['p99'][feature]:.3f}",
        "mean": f"{stats['mean'][feature]:.3f}",
    }
    if domain >= 0:
        share = f"{stats['domain_purity'][feature]:.0%}"
        facts["purity"] = f"{share} {html.escape(index.domains[domain])}"
    for name, title in (("cos_enc_dec", "cos enc·dec"), ("nearest_cosine", "nearest cos")):
        if name in stats:
            facts[title] = f"{stats[name][feature]:.3f}"
    cells = "".join(f"<div><span>{name}</span>{value}</div>" for name, value in facts.items())
    badge = f'<span class="mono-flag">{flag}</span>' if flag else ""
    st.html(
        f'<div class="mono-facts"><div class="mono-title">Feature {feature:,} {badge}</div>'
        f'{cells}</div><div class="mono-source">{html.escape(provenance(page))}</div>',
    )


def provenance(page: Page) -> str:
    """One line: which dictionary, model, hook and text the numbers come from."""
    attributes = page.index.attributes
    model = attributes.get("model") or {}
    name = model.get("id", "?") if isinstance(model, dict) else model
    recipe = page.entry.config.get("recipe", "?")
    return (
        f"{page.entry.id} · {recipe} · {page.index.d_sae:,} features · {name} "
        f"{attributes.get('hook_point', '')} · {page.index.kept_tokens:,} tokens in "
        f"{page.index.n_contexts:,} contexts of {page.index.seq_len}"
    )


def _histograms(page: Page, values: np.ndarray) -> None:
    if len(values):
        st.caption("Activations", help=HELP["activations"])
        chart = charts.activation_chart(data.activation_histogram(values))
        st.altair_chart(chart, key="activation_histogram")
    if page.index.has("logits/histogram"):
        st.caption("Logit weights over the vocabulary", help=HELP["logits"])
        chart = charts.logit_chart(data.logit_histogram(page.index, page.feature))
        st.altair_chart(chart, key="logit_histogram")


def _logits(page: Page) -> None:
    if not page.index.has("logits/top_id"):
        return
    lists = []
    for side, title in (("top", "Raises"), ("bottom", "Lowers")):
        ids = page.index.panel(f"logits/{side}_id", page.feature)[:N_LIST].tolist()
        weights = page.index.panel(f"logits/{side}_value", page.feature)[:N_LIST].tolist()
        most = max((abs(w) for w in weights), default=1.0) or 1.0
        rows = [
            Row(
                label(page.index.token_bytes(i)),
                f"{weight:+.2f}",
                abs(weight) / most,
                negative=side == "bottom",
            )
            for i, weight in zip(ids, weights, strict=True)
        ]
        lists.append(RowList(title, rows, HELP["logits"]))
    draw_lists(lists, key="logit_lists", two=True, on_open=None)


def _lists(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    index, feature = page.index, page.feature
    lists = []
    shares = data.token_shares(index, rows, values, N_LIST)
    if shares:
        token_rows = [
            Row(
                label(index.token_bytes(each.token_id)),
                f"{each.share:.1%}",
                each.share,
                f"{each.mean:.2f}",
            )
            for each in shares
        ]
        lists.append(RowList("Tokens it fires on", token_rows, HELP["tokens"], "orange"))
    if index.has("neighbours/id"):
        lists.append(RowList("Similar features", _neighbours(page), HELP["neighbours"]))
    if index.has("neurons/weight_id"):
        rows_ = [
            Row(f"neuron {i}", f"{weight:+.3f}", float(share) * 5, f"{share:.1%}", weight < 0)
            for i, weight, share in zip(
                index.panel("neurons/weight_id", feature).tolist(),
                index.panel("neurons/weight_value", feature).tolist(),
                index.panel("neurons/weight_share", feature).tolist(),
                strict=True,
            )
        ]
        lists.append(RowList("Neurons, by weight", rows_, HELP["weight"]))
    if index.has("neurons/corr_id"):
        rows_ = [
            Row(f"neuron {i}", f"{r:+.3f}", abs(r), negative=r < 0)
            for i, r in zip(
                index.panel("neurons/corr_id", feature).tolist(),
                index.panel("neurons/corr_value", feature).tolist(),
                strict=True,
            )
        ]
        lists.append(RowList("Neurons, by Pearson", rows_, HELP["pearson"]))
    draw_lists(lists, key="lists", two=True, on_open=state.open_feature)


def _neighbours(page: Page) -> list[Row]:
    ids = page.index.panel("neighbours/id", page.feature).tolist()
    cosines = page.index.panel("neighbours/cosine", page.feature).tolist()
    top = page.index.stats["top_token"]
    found = []
    for i, cosine in zip(ids, cosines, strict=True):
        token = label(page.index.token_bytes(int(top[i]))) if top[i] >= 0 else "dead"
        found.append(
            Row(
                token,
                f"{cosine:+.3f}",
                abs(cosine),
                prefix=str(i),
                negative=cosine < 0,
                open=i,
            )
        )
    return found


def _examples(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    title, length, seed = st.columns([0.36, 0.44, 0.2], vertical_alignment="center")
    title.caption("Examples", help=HELP["examples"])
    window = length.segmented_control(
        "Text around",
        list(CONTEXTS),
        default="medium",
        key="around",
        bind="query-params",
        label_visibility="collapsed",
        required=True,
    )
    draw = seed.number_input(
        "Draw",
        0,
        9999,
        0,
        key="draw",
        bind="query-params",
        label_visibility="collapsed",
        icon=":material/casino:",
    )
    before, after = CONTEXTS[str(window)]
    groups = example_groups(page, rows, values, before=before, after=after, seed=int(draw))
    bos = page.index.attributes.get("bos")
    draw_examples(groups, float(values.max()), bos=bos, key="examples")


def example_groups(
    page: Page, rows: np.ndarray, values: np.ndarray, *, before: int, after: int, seed: int
) -> list[Group]:
    """The top activations, then the eleven intervals from the highest down."""

    def around(wanted: np.ndarray) -> list[data.Example]:
        return data.examples(page.index, rows, values, wanted, before=before, after=after)

    top = data.top_rows(rows, values, N_TOP, page.index.seq_len)
    groups = [Group("Top activations", f"max {values.max():.3f}", around(top))]
    found = data.intervals(rows, values, per_interval=PER_INTERVAL, seed=seed)
    for i, each in enumerate(found):
        groups.append(
            Group(
                f"Interval {len(found) - i}",
                f"({each.low:.2f}, {each.high:.2f}] · {each.count:,} firings, {each.share:.2%} of all",
                around(each.rows),
                "no firing lies in this interval",
            )
        )
    return groups
