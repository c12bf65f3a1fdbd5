"""The lists of a feature's page: tokens, other features and neurons, each with a bar."""

from __future__ import annotations

import numpy as np

from browser import comparison, data, state
from browser.components import Row, RowList, draw_lists
from browser.state import Page
from browser.tokens import label

N_LIST = 10
LOGIT_WEIGHT = (
    "Logit weight of a token = (r − mean r) · w · W_U: what one unit of activation adds to the token's logit by the "
    "direct path, up to 1/σ of the norms on the way. r is what the decoder direction adds to the residual stream "
    "(through W_out, W_O, or a norm after the layer), w the final norm's weight; RMSNorm keeps the mean. Shifted so "
    "that the median token is at 0; padding rows of the embedding are left out."
)
HELP = {
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
}
TITLES = {
    "successors": "Fires next",
    "neighbours": "Similar direction",
    "correlated": "Similar activations",
    "together": "Fires together",
}


def show(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    """Draws every list that the index has, then the feature's partners in other dictionaries."""
    index = page.index
    lists = [
        _logit_list(page, side, title)
        for side, title in (("top", "Raises"), ("bottom", "Lowers"))
        if index.has(f"logits/{side}_id")
    ]
    if len(rows):
        lists.append(_token_list(page, rows, values))
    lists += [
        RowList(TITLES[name], _feature_rows(page, name, score), HELP[name], empty="none found")
        for name, score in data.RELATED.items()
        if index.has(f"{name}/id")
    ]
    if index.has("neurons/weight_id"):
        lists.append(RowList("Aligned neurons", _aligned_neurons(page), HELP["weight"]))
    if index.has("neurons/corr_id"):
        lists.append(RowList("Correlated neurons", _correlated_neurons(page), HELP["pearson"]))
    draw_lists(lists, key="lists", two=True, on_open=state.open_feature)
    _elsewhere(page)


def _aligned_neurons(page: Page) -> list[Row]:
    ids, weights = (page.index.panel(f"neurons/weight_{column}", page.feature) for column in ("id", "value"))
    known = page.index.has("neurons/weight_share")  # not on imported pages
    total = np.nansum(np.abs(weights))
    shares = page.index.panel("neurons/weight_share", page.feature) if known else np.abs(weights) / total
    return [
        Row(f"neuron {i}", f"{weight:+.3f}", share * 5, f"{share:.1%}" if known else "", negative=weight < 0)
        for i, weight, share in zip(ids.tolist(), weights.tolist(), shares.tolist(), strict=True)
        if i >= 0
    ]


def _correlated_neurons(page: Page) -> list[Row]:
    ids, values = (page.index.panel(f"neurons/corr_{column}", page.feature).tolist() for column in ("id", "value"))
    return [Row(f"neuron {i}", f"{r:+.3f}", abs(r), negative=r < 0) for i, r in zip(ids, values, strict=True)]


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
    return RowList(title, rows, LOGIT_WEIGHT)


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
