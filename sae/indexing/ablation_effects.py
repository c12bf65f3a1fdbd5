"""Δloss of every feature from sampled firings: what the table of features and the intervals say of ablation."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.indexing.co_activation import Firings, evenly
from sae.interventions.ablation import LOGITS_AT_ONCE, final_residual, has_closed_form, read_out, to_residual
from sae.jobs.progress import progress
from sae.lm import LanguageModel, NativeModel

INTERVALS = 11
PER_INTERVAL = 2
NEAR_SHARE = 1 / 8  # of the contexts, drawn at random, are looked in first: running the model on each is what costs
MAX_FIRINGS = 20_000
CONTEXTS_AT_ONCE = 64


@torch.inference_mode()
def panels(
    sae: SAE, model: LanguageModel, firings: Firings, hook_point: str, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Mean Δloss of a feature's firings, and mean |Δloss| of each of its eleven activation intervals.

    Δloss is that of the next token when the feature is ablated (nats, > 0: it helped). Of each interval `(lo, hi]` up
    to PER_INTERVAL firings are drawn; `stats/delta_loss` weighs the intervals' means by their counts.
    Empty where the closed form does not hold: there a view runs the model again for what it shows.
    """
    if not has_closed_form(model, hook_point):
        return {}
    assert isinstance(model, NativeModel)
    d_sae = len(firings.ptr) - 1
    feature, row, value, interval, counts = _drawn(firings, seed)
    delta = _delta_losses(
        model, firings, feature, row, value, to_residual(model, sae.W_dec.to(model.device), hook_point)
    )
    cell = feature * INTERVALS + interval
    samples = np.bincount(cell, minlength=d_sae * INTERVALS).reshape(d_sae, INTERVALS)
    divisor = np.maximum(samples, 1)
    mean = np.bincount(cell, delta, d_sae * INTERVALS).reshape(d_sae, INTERVALS) / divisor
    mean_abs = np.bincount(cell, np.abs(delta), d_sae * INTERVALS).reshape(d_sae, INTERVALS) / divisor
    weight = np.where(samples > 0, counts, 0)
    total = weight.sum(1)
    overall = np.where(total > 0, (mean * weight).sum(1) / np.maximum(total, 1), np.nan)
    return {
        "stats/delta_loss": overall,
        "effects/interval_abs": mean_abs,
        "effects/interval_samples": samples.astype(np.uint8),
    }


def interval_of(values: np.ndarray, largest: float) -> np.ndarray:
    """Number of the interval (lo, hi] of each value, with edges linspace(0, largest, 12)."""
    edges = np.linspace(0.0, largest, INTERVALS + 1)
    return np.clip(np.searchsorted(edges, values, side="left") - 1, 0, INTERVALS - 1)


def _drawn(firings: Firings, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(feature, row, value, interval) of the sampled firings, and the firings of each interval [d_sae, INTERVALS]."""
    d_sae, seq_len = len(firings.ptr) - 1, firings.tokens.shape[1]
    keep = firings.keep.reshape(-1)
    rng = np.random.default_rng(seed)
    far = rng.random(len(firings.tokens)) >= NEAR_SHARE
    parts: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64),) * 2 + (np.zeros(0),) + (np.zeros(0, np.int64),)]
    counts = np.zeros((d_sae, INTERVALS), np.int64)
    for f in range(d_sae):
        lo, hi = int(firings.ptr[f]), int(firings.ptr[f + 1])
        if lo == hi:
            continue
        values = np.asarray(firings.values[lo:hi], np.float64)
        place = interval_of(values, float(values.max()))
        counts[f] = np.bincount(place, minlength=INTERVALS)
        rows = np.asarray(firings.rows[lo:hi]).astype(np.int64)
        predicts = rows % seq_len < seq_len - 1
        predicts[predicts] = keep[rows[predicts] + 1]
        able = np.flatnonzero(predicts)
        if len(able) > MAX_FIRINGS:  # the strong ones are few: none of them is thinned out
            strong = able[place[able] > 0]
            weak = able[place[able] == 0]
            able = np.concatenate([strong[evenly(len(strong), MAX_FIRINGS, rng)], weak[evenly(len(weak), 64, rng)]])
        able = able[rng.permutation(len(able))]
        able = able[np.lexsort((far[rows[able] // seq_len], place[able]))]
        ids, first, n = np.unique(place[able], return_index=True, return_counts=True)
        rank = np.arange(len(able)) - np.repeat(first, n)
        chosen = able[rank < PER_INTERVAL]
        parts.append((np.full(len(chosen), f), rows[chosen], values[chosen], place[chosen]))
    feature, row, value, interval = (np.concatenate(column) for column in zip(*parts, strict=True))
    return feature, row, value, interval, counts


def _delta_losses(
    model: NativeModel,
    firings: Firings,
    feature: np.ndarray,
    row: np.ndarray,
    value: np.ndarray,
    written: Float[Tensor, "d_sae d_model"],
) -> np.ndarray:
    """Δloss of the token after each row when its feature is ablated there."""
    seq_len = firings.tokens.shape[1]
    order = np.argsort(row, kind="stable")
    context = row[order] // seq_len
    delta = np.zeros(len(row))
    wanted = np.unique(context)
    with progress("ablate", len(row), "firings") as bar:
        for start in range(0, len(wanted), CONTEXTS_AT_ONCE):
            batch = wanted[start : start + CONTEXTS_AT_ONCE]
            lo, hi = np.searchsorted(context, [batch[0], batch[-1] + 1])
            here = order[lo:hi]
            tokens = torch.from_numpy(firings.tokens[batch].astype(np.int64))
            resid = final_residual(model, tokens)
            for part in np.array_split(here, 1 + len(here) * model.d_vocab // LOGITS_AT_ONCE):
                c = torch.from_numpy(np.searchsorted(batch, row[part] // seq_len))
                p = torch.from_numpy(row[part] % seq_len)
                before, target = resid[c, p], tokens[c, p + 1].to(model.device)
                removed = torch.from_numpy(value[part]).to(before)[:, None] * written[torch.from_numpy(feature[part])]
                delta[part] = (_loss(model, before - removed, target) - _loss(model, before, target)).cpu().numpy()
            bar.update(len(here))
    return delta


def _loss(model: NativeModel, resid: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(read_out(model, resid), target, reduction="none").double()
