"""Δloss of every feature from sampled firings, for the table of features and for the intervals of its activation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.indexing.firings import Firings, next_token_is_kept, rows_of, systematic_sample
from sae.interventions.ablation import LOGITS_AT_ONCE, final_residual, has_closed_form, read_out, to_residual
from sae.jobs.progress import progress
from sae.lm import LanguageModel, NativeModel

INTERVALS = 11
PER_INTERVAL = 2
# Firings in a random 1/8 of the contexts are preferred: running the model on a context is what costs time.
PREFERRED_SHARE = 1 / 8
MAX_FIRINGS = 20_000  # of one feature that are considered, in its strong intervals
MAX_WEAK_FIRINGS = 64  # then considered of its weakest interval
CONTEXTS_AT_ONCE = 64


class SampledFirings(NamedTuple):
    """Firings on which ablation is measured; `interval` numbers the activation interval each one lies in."""

    feature: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    value: Float64[np.ndarray, " n"]
    interval: Int[np.ndarray, " n"]


@torch.inference_mode()
def panels(
    sae: SAE, model: LanguageModel, firings: Firings, hook_point: str, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Mean Δloss of a feature's firings, and mean |Δloss| in each of its eleven activation intervals.

    Δloss is the change of the next token's loss when the feature is ablated (nats; > 0: the feature helped). Up to
    PER_INTERVAL firings are drawn from each interval `(lo, hi]`; `stats/delta_loss` weights the interval means by the
    number of firings in each interval.
    Returns no panel if there is no closed form; the browser then runs the model for the examples that it shows. Nor for
    a dictionary that scales each row: what a feature adds to the model then depends on the row.
    """
    if sae.scales_rows or not has_closed_form(model, hook_point):
        return {}
    assert isinstance(model, NativeModel)
    sampled, counts = _sample(firings, np.random.default_rng(seed))
    directions = to_residual(model, sae.W_dec.to(model.device), hook_point)
    delta = _delta_losses(model, firings, sampled, directions)
    cell = sampled.feature * INTERVALS + sampled.interval

    def per_interval(weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(cell, weights, counts.size).reshape(counts.shape)

    samples = per_interval()
    mean, mean_abs = (per_interval(values) / np.maximum(samples, 1) for values in (delta, np.abs(delta)))
    weight = np.where(samples > 0, counts, 0)
    total = weight.sum(1)
    return {
        "stats/delta_loss": np.where(total > 0, (mean * weight).sum(1) / np.maximum(total, 1), np.nan),
        "effects/interval_abs": mean_abs,
        "effects/interval_samples": samples.astype(np.uint8),
    }


def interval_of(values: Float[np.ndarray, "*n"], largest: float) -> Int[np.ndarray, "*n"]:
    """The number of the interval `(lo, hi]` that holds each value; the edges are linspace(0, largest, 12)."""
    edges = np.linspace(0.0, largest, INTERVALS + 1)
    return np.clip(np.searchsorted(edges, values, side="left") - 1, 0, INTERVALS - 1)


def _sample(firings: Firings, rng: np.random.Generator) -> tuple[SampledFirings, Int[np.ndarray, "d_sae intervals"]]:
    """Firings drawn from each interval of each feature, and the number of all its firings there."""
    d_sae = len(firings.ptr) - 1
    preferred = rng.random(len(firings.tokens)) < PREFERRED_SHARE  # contexts
    nothing = SampledFirings(*(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.float64, np.int64)))
    parts, counts = [nothing], np.zeros((d_sae, INTERVALS), np.int64)
    for f in range(d_sae):
        rows = rows_of(firings, f)
        if not len(rows):
            continue
        values = np.asarray(firings.values[int(firings.ptr[f]) : int(firings.ptr[f + 1])], np.float64)
        interval = interval_of(values, float(values.max()))
        counts[f] = np.bincount(interval, minlength=INTERVALS)
        chosen = _choose(firings, rows, interval, preferred, rng)
        parts.append(SampledFirings(np.full(len(chosen), f), rows[chosen], values[chosen], interval[chosen]))
    return SampledFirings(*(np.concatenate(column) for column in zip(*parts, strict=True))), counts


def _choose(
    firings: Firings, rows: np.ndarray, interval: np.ndarray, preferred: np.ndarray, rng: np.random.Generator
) -> Int[np.ndarray, " chosen"]:
    """Up to PER_INTERVAL of a feature's firings in each interval, with a next token to predict."""
    usable = np.flatnonzero(next_token_is_kept(firings, rows))
    if len(usable) > MAX_FIRINGS:  # strong firings are rare and are kept; most firings lie in the weakest interval
        strong, weak = usable[interval[usable] > 0], usable[interval[usable] == 0]
        strong = strong[systematic_sample(len(strong), MAX_FIRINGS, rng)]
        weak = weak[systematic_sample(len(weak), MAX_WEAK_FIRINGS, rng)]
        usable = np.concatenate([strong, weak])
    usable = usable[rng.permutation(len(usable))]
    usable = usable[np.lexsort((~preferred[rows[usable] // firings.tokens.shape[1]], interval[usable]))]
    _, first, n = np.unique(interval[usable], return_index=True, return_counts=True)
    rank = np.arange(len(usable)) - np.repeat(first, n)
    return usable[rank < PER_INTERVAL]


def _delta_losses(
    model: NativeModel, firings: Firings, sampled: SampledFirings, directions: Float[Tensor, "d_sae d_model"]
) -> Float64[np.ndarray, " n"]:
    """Δloss of the token after each sampled row when the feature is ablated there, in nats."""
    seq_len = firings.tokens.shape[1]
    by_row = np.argsort(sampled.row, kind="stable")
    context = sampled.row[by_row] // seq_len
    contexts = np.unique(context)
    delta = np.zeros(len(sampled.row))
    with progress("ablate", len(sampled.row), "firings") as bar:
        for start in range(0, len(contexts), CONTEXTS_AT_ONCE):
            batch = contexts[start : start + CONTEXTS_AT_ONCE]
            low, high = np.searchsorted(context, [batch[0], batch[-1] + 1])
            here = by_row[low:high]
            tokens = torch.from_numpy(firings.tokens[batch].astype(np.int64))
            resid = final_residual(model, tokens)
            for part in np.array_split(here, 1 + len(here) * model.d_vocab // LOGITS_AT_ONCE):
                c = torch.from_numpy(np.searchsorted(batch, sampled.row[part] // seq_len))
                p = torch.from_numpy(sampled.row[part] % seq_len)
                before, target = resid[c, p], tokens[c, p + 1].to(model.device)
                activation = torch.from_numpy(sampled.value[part]).to(before)[:, None]
                after = before - activation * directions[torch.from_numpy(sampled.feature[part])]
                delta[part] = (_losses(model, after, target) - _losses(model, before, target)).cpu().numpy()
            bar.update(len(here))
    return delta


def _losses(model: NativeModel, resid: Float[Tensor, "n d_model"], target: Int[Tensor, " n"]) -> Float64[Tensor, " n"]:
    return torch.nn.functional.cross_entropy(read_out(model, resid), target, reduction="none").double()
