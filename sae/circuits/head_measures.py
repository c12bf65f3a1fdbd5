"""The measures of the lens `heads`: scores of each head, beside those of the model shuffled and before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.analysis.untrained import matrices_shuffled, weights_initialised
from sae.circuits import heads, orders, skip_trigrams, weights
from sae.circuits.intervals import mean_interval
from sae.circuits.results import Control, Interval, Measure, Value
from sae.lm import LanguageModel, ModelError
from sae.text.tokenizer import token_text

LENGTH, COPIES, LONG = 25, 4, 100  # of made-up text: 25 tokens × 4, and 100 × 2
TRIGRAMS, SHOWN, FREQUENT = 100, 8, 1000
HEADS, PAIRS = ("layer", "head"), ("writer", "reader")
UNTRAINED: dict[str, tuple[Callable[[LanguageModel, int], AbstractContextManager[LanguageModel]], str]] = {
    "shuffled_weights": (matrices_shuffled, "the same model with the entries of every weight matrix shuffled"),
    "initialised": (weights_initialised, "the same model before training: matrices from N(0, 0.02²)"),
}


@dataclass(frozen=True)
class Found:
    """One quantity of one model: its value, what it averages over, and controls that belong to this quantity alone."""

    value: Float[Tensor, "..."]
    n: int
    of: str
    formula: str
    axes: tuple[str, ...]
    ci95: Interval | None = None
    controls: Mapping[str, Control] = field(default_factory=dict)


class Texts(NamedTuple):
    """What heads are measured on: contexts of held-out text, and more text to count in."""

    held_out: Int[Tensor, "contexts pos"]
    counted: Int[Tensor, "more pos"]


def head_measures(
    model: LanguageModel, texts: Texts, *, made_up: int = 10, seed: int = 0
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """All measures of heads with their controls; and labels: the skip-trigrams, the measures left out and why.

    `made_up` is the number of made-up texts. The caller holds the model's lock: controls change its weights meanwhile.
    """
    found, labels = measured(model, texts, made_up, seed)
    controls: dict[str, dict[str, Found]] = {}
    for name, (change, _) in UNTRAINED.items():
        with change(model, seed):
            controls[name], _ = measured(model, texts, made_up, seed)
    return {name: _with_controls(name, each, controls) for name, each in found.items()}, labels


def measured(model: LanguageModel, texts: Texts, made_up: int, seed: int) -> tuple[dict[str, Found], dict[str, Any]]:
    """All quantities of a model as it is now; those that its architecture has not are named with the reason."""
    labels: dict[str, Any] = {"left_out": {}}
    found = dict(_of_patterns(model, texts, made_up, seed)) | dict(_of_ablation(model, texts, made_up, seed))
    try:
        model.weights()
    except ModelError as error:
        labels["left_out"]["weights"] = str(error)
        return found, labels
    found |= dict(_of_weights(model, texts, made_up, seed))
    trigrams, labels["skip_trigrams"] = _of_skip_trigrams(model, texts, seed)
    found |= trigrams
    try:
        found |= _of_orders(model, texts)
    except ModelError as error:
        labels["left_out"]["order_terms"] = str(error)
    return found, labels


def _with_controls(name: str, found: Found, untrained: Mapping[str, Mapping[str, Found]]) -> Measure:
    controls = dict(found.controls)
    for kind, (_, what) in UNTRAINED.items():
        other = untrained[kind].get(name)
        if other is not None:
            controls[kind] = Control(other.value, what, other.ci95)
    controls = {kind: Control(_plain(each.value), each.what, _ends(each.ci95)) for kind, each in controls.items()}
    return Measure(_plain(found.value), found.n, found.of, found.formula, controls, _ends(found.ci95), found.axes)


def _plain(value: Value) -> Value:
    """A number where there are no axes."""
    return float(value) if isinstance(value, Tensor) and value.ndim == 0 else value


def _ends(interval: Interval | None) -> Interval | None:
    return None if interval is None else (_plain(interval[0]), _plain(interval[1]))


# --- patterns --------------------------------------------------------------------------------------------------------


def _scores(scores: heads.Scores, formula: str, controls: Mapping[str, Control] | None = None) -> Found:
    values = scores.values
    return Found(
        scores.mean,
        len(values),
        "texts",
        formula,
        HEADS,
        mean_interval(values) if len(values) > 1 else None,
        controls or {},
    )


def _of_patterns(model: LanguageModel, texts: Texts, made_up: int, seed: int) -> Iterator[tuple[str, Found]]:
    repeated = made_up_text(model, texts, LENGTH, COPIES, made_up, seed)
    plain = made_up_text(model, texts, repeated.shape[1] - (model.bos_id is not None), 1, made_up, seed)
    cells = heads.same_cells_without_repeats(model, repeated, plain)
    elsewhere = Control(cells.mean, "attention at the same places of text in which no token comes twice")
    yield (
        "prefix_matching",
        _scores(
            heads.prefix_matching(model, repeated),
            "mean attention to the token after an earlier copy of the current one",
            {"no_repeats": elsewhere},
        ),
    )
    before, first = heads.previous_token(model, texts.held_out[:made_up])
    yield "previous_token", _scores(before, "mean over i ≥ 2 of A[i, i − 1], on text")
    yield "first_position", _scores(first, "mean over i ≥ 2 of A[i, 0], on text")


def made_up_text(
    model: LanguageModel, texts: Texts, length: int, copies: int, n: int, seed: int
) -> Int[Tensor, "texts pos"]:
    """Made-up text of tokens that are neither common nor rare in the counted text; shorter where contexts are short."""
    pool = heads.ordinary_tokens(model, texts.counted)
    fits = max(2, (model.context_tokens - 1) // copies)
    return heads.repeated_tokens(
        pool, length=min(length, fits, len(pool)), copies=copies, texts=n, bos_id=model.bos_id, seed=seed
    )


def _of_ablation(model: LanguageModel, texts: Texts, made_up: int, seed: int) -> Iterator[tuple[str, Found]]:
    twice = made_up_text(model, texts, LONG, 2, made_up, seed + 1)
    means = heads.mean_outputs(model, texts.held_out)
    for kind in ("mean", "zero"):
        lost = heads.ablate_heads(model, twice, kind, means=means if kind == "mean" else None)
        second = lost.second - lost.second_clean[:, None, None]
        first = lost.first - lost.first_clean[:, None, None]
        formula = f"loss of the second of two copies of random tokens with the head's output at its {kind}"
        formula = formula.replace("at its zero", "at zero") + ", minus without (nats)"
        control = Control(first.double().mean(0), "the same for the first copy, which cannot be foretold")
        yield (
            f"ablation_{kind}",
            Found(
                second.double().mean(0),
                len(twice),
                "texts",
                formula,
                HEADS,
                mean_interval(second),
                {"first_copy": control},
            ),
        )
    clean = lost.second_clean.double()
    control = Control(lost.first_clean.double().mean(), "loss of the first copy")
    yield (
        "repeat_loss",
        Found(
            clean.mean(),
            len(twice),
            "texts",
            "mean loss of the second of two copies of random tokens (nats)",
            (),
            mean_interval(clean),
            {"first_copy": control},
        ),
    )


# --- weights ---------------------------------------------------------------------------------------------------------


def _of_weights(model: LanguageModel, texts: Texts, made_up: int, seed: int) -> Iterator[tuple[str, Found]]:
    plain = made_up_text(model, texts, LENGTH, 1, made_up, seed)
    if model.bos_id is not None:
        yield "copying", _scores(heads.copying(model, plain), "2 · share of raised logits on tokens read − 1")
    w = model.weights()
    n = w.n_heads * len(w.layers)
    yield "ov_eigenvalues", _exact(weights.copying_scores(model), "Σ Re λ / Σ |λ| of W_E OV W_U", HEADS, n)
    yield "qk_eigenvalues", _exact(weights.matching_scores(model), "Σ Re λ / Σ |λ| of W_E QK W_Eᵀ", HEADS, n)
    if len(w.layers) == 1:
        return
    mean, spread = weights.random_composition(w.W_E.shape[1], w.d_head, seed=seed)
    random = Control(mean, f"pairs of heads with normal random weights; standard deviation {spread:.4f}")
    for kind in ("q", "k", "v"):
        scores = weights.composition_scores(model, kind)
        formula = {"q": "‖OV₁ QK₂‖ / ‖OV₁‖ ‖QK₂‖", "k": "‖QK₂ OV₁ᵀ‖ / ‖QK₂‖ ‖OV₁‖", "v": "‖OV₁ OV₂‖ / ‖OV₁‖ ‖OV₂‖"}[
            kind
        ]
        found = _exact(scores, formula, PAIRS, n)
        yield f"{kind}_composition", Found(found.value, n, "heads", formula, PAIRS, None, {"random_heads": random})
    through = torch.full((n, n), torch.nan, dtype=torch.float64)
    for layer in range(1, len(w.layers)):
        end = layer * w.n_heads
        through[:end, end : end + w.n_heads] = weights.k_composed_matching(model, layer)
    formula = "Σ Re λ / Σ |λ| of W_E QK₂ (W_E OV₁)ᵀ: the keys as the earlier head writes them"
    yield "k_composed_eigenvalues", _exact(through, formula, PAIRS, n)


def _exact(value: Tensor, formula: str, axes: tuple[str, ...], n: int) -> Found:
    return Found(value, n, "heads", formula, axes)


def _of_skip_trigrams(model: LanguageModel, texts: Texts, seed: int) -> tuple[dict[str, Found], list[Any]]:
    """Lift of the best skip-trigrams of each head of the first layer, and what they are."""
    folded, ids = weights.Folded.of(model), model.token_ids
    counts = torch.bincount(texts.counted.flatten(), minlength=int(ids.max()) + 1)[ids]
    frequent = counts.argsort(descending=True, stable=True)[:FREQUENT]
    frequent = frequent[ids[frequent] != (-1 if model.bos_id is None else model.bos_id)]
    values, controls, described, places = [], [], [], 0
    for head in range(folded.weights.n_heads):
        best = skip_trigrams.skip_trigrams(folded.circuits(0, head), TRIGRAMS, among=frequent)
        counted = skip_trigrams.lift(best, texts.counted, ids)
        mixed = skip_trigrams.lift(skip_trigrams.with_shuffled_destinations(best, seed=seed), texts.counted, ids)
        values.append(_pooled_lift(counted))
        controls.append(_pooled_lift(mixed))
        places += int(counted.seen.sum())
        described.append(_described(model, best, counted))
    control = Control(torch.stack(controls), "each with the destination of another skip-trigram of the list")
    formula = (
        f"(Σ hits + 1) / (Σ expected + 1) over the {TRIGRAMS} best skip-trigrams: P(out | destination, source before) "
    )
    found = Found(
        torch.stack(values),
        max(1, places),
        "places in the text",
        f"{formula}against P(out | destination)",
        ("head",),
        None,
        {"shuffled_destinations": control},
    )
    return {"skip_trigram_lift": found}, described


def _pooled_lift(counted: skip_trigrams.Lift) -> Float[Tensor, ""]:
    """Of all the skip-trigrams together, because each of them is rare; 1 is added to both sums."""
    return (counted.hits.sum().double() + 1) / (counted.expected.sum() + 1)


def _described(model: LanguageModel, best: skip_trigrams.SkipTrigrams, counted: skip_trigrams.Lift) -> dict[str, Any]:
    """The first few skip-trigrams and forced pairs of a head, as text."""

    def text(*places: int) -> str:
        source, destination, out = (token_text(model.tokenizer, int(model.token_ids[place])) for place in places)
        return f"{source} … {destination} → {out}"

    rows = zip(*(part.tolist() for part in best), counted.lift.tolist(), counted.hits.tolist(), strict=True)
    shown = [
        {"skip_trigram": text(s, d, o), "score": round(score, 3), "lift": round(lift, 2), "hits": hits}
        for s, d, o, score, lift, hits in rows
    ]
    forced = skip_trigrams.forced_pairs(best, counted)
    pairs = [
        {
            "forced": text(pair.source, pair.destination, pair.out),
            "lift": round(pair.lift, 2),
            "by": [text(pair.source, *supported) for supported in pair.supported],
        }
        for pair in forced
    ]
    return {"best": shown[:SHOWN], "forced_pairs": pairs[:SHOWN], "n_forced": len(forced)}


def _of_orders(model: LanguageModel, texts: Texts) -> dict[str, Found]:
    """Loss that paths through n heads save, and how well the direct path agrees with counted bigrams."""
    losses = orders.losses_by_order(model, texts.held_out)
    saved = (losses[:-1] - losses[1:]).T
    formula = "loss with paths through at most n − 1 heads, minus with at most n (nats), patterns and norm scales held"
    terms = Found(saved.mean(0), len(saved), "contexts", formula, ("order",), mean_interval(saved))
    logits, ids = weights.direct_bigrams(model), model.token_ids
    agreement, rows = weights.bigram_agreement(logits, texts.counted, ids)
    turned = logits[rows.roll(1)] if len(rows) else logits[:0]
    other = torch.empty_like(logits)
    other[rows] = turned
    mixed, _ = weights.bigram_agreement(other, texts.counted, ids)
    control = Control(mixed.mean(), "the logits of another token")
    formula = "mean correlation of the direct path's logits with counted log P(next | token), per token"
    bigrams = Found(
        agreement.mean(), max(1, len(rows)), "tokens", formula, (), mean_interval(agreement), {"other_token": control}
    )
    return {"order_terms": terms, "direct_bigrams": bigrams}
