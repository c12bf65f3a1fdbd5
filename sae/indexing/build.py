"""The feature index: every activation of every feature, and what its page shows, in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import Placed
from sae.indexing import ablation_effects, co_activation, rules
from sae.indexing import map as feature_map
from sae.indexing.co_activation import Firings
from sae.indexing.correlation import NEURONS, Correlation
from sae.jobs.progress import progress
from sae.kernels.activations import SparseActs
from sae.lm import LanguageModel
from store.common import read_ahead

TOP_LOGITS = 20
LOGIT_BUCKETS = 40
NEIGHBOURS = 10
FEATURES_AT_ONCE = 512


class IndexBlock(NamedTuple):
    """Whole contexts as the index numbers them; `document` counts in the index's own table."""

    first_context: int
    acts: Float[Tensor, "rows d_in"]
    tokens: np.ndarray
    keep: np.ndarray
    document: np.ndarray


class IndexSink(Protocol):
    """Takes the activations in any order and the finished panels; `store.features.FeatureWriter` is one."""

    def append(
        self,
        first_context: int,
        tokens: np.ndarray,
        keep: np.ndarray,
        document: np.ndarray,
        rows: np.ndarray,
        features: np.ndarray,
        values: np.ndarray,
    ) -> None: ...

    def finish(
        self, panels: dict[str, np.ndarray], from_firings: Callable[[Firings], dict[str, np.ndarray]] | None = None
    ) -> Path: ...


@torch.inference_mode()
def index(
    sae: SAE,
    model: LanguageModel,
    blocks: Iterable[IndexBlock],
    sink: IndexSink,
    *,
    hook_point: str,
    tokens: int,
    resampled: Mapping[int, int] | None = None,
    device: str = "auto",
    kernels: str = "auto",
) -> Path:
    """Encodes every block once, then adds logit weights, neurons, neighbours, what fires together, labels and Δloss.

    `hook_point` is where the decoder writes: where x was read, or a transcoder's target.
    `resampled` is the step of a feature's last resampling, `stats/resampled_step` (-1: never).
    """
    correlation, placed = Correlation(sae.d_sae, sae.d_in), Placed(sae, device, kernels)

    @torch.inference_mode()
    def encoded(block: IndexBlock) -> tuple[IndexBlock, SparseActs]:
        return block, placed.encode(block.acts)

    with progress("index", tokens, "tok") as bar:
        for block, acts in read_ahead(encoded, blocks):  # the next block is encoded while this one is taken in
            kept = torch.from_numpy(block.keep.reshape(-1))
            acts = acts.where(kept[acts.support.rows] & (acts.values > 0))
            first_row = block.first_context * block.tokens.shape[1]
            sink.append(
                block.first_context,
                block.tokens,
                block.keep,
                block.document,
                acts.support.rows.numpy() + first_row,
                acts.support.features.numpy(),
                acts.values.numpy(),
            )
            correlation.add(acts, block.acts, kept)
            bar.update(block.tokens.size)

    def from_firings(firings: Firings) -> dict[str, np.ndarray]:
        return (
            co_activation.panels(firings)
            | rules.panels(firings)
            | ablation_effects.panels(sae, model, firings, hook_point)
        )

    resampled_step = np.full(sae.d_sae, -1, np.int32)
    for feature, step in (resampled or {}).items():
        resampled_step[feature] = step
    static = panels(sae, model, hook_point) | correlation.panels() | {"stats/resampled_step": resampled_step}
    return sink.finish(static, from_firings)


def panels(sae: SAE, model: LanguageModel, hook_point: str) -> dict[str, np.ndarray]:
    """What follows from the weights alone: logit weights, aligned neurons, nearest features, encoder alignment, map."""
    parts: dict[str, list[np.ndarray]] = {}
    unit = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    for chunk in _chunks(sae.d_sae):
        found = _logit_panels(model.logit_weights(sae.W_dec[chunk].to(model.device), hook_point).cpu())
        found |= _neighbour_panels(unit, chunk)
        if not sae.is_transcoder:  # whose decoder writes to no neuron of x
            found |= _neuron_panels(sae.W_dec[chunk])
        for name, array in found.items():
            parts.setdefault(name, []).append(array)
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    joined |= feature_map.panels(sae.W_dec)
    if not sae.is_transcoder:  # whose two directions live in different spaces
        joined["stats/cos_enc_dec"] = torch.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1).numpy()
    return joined


def _chunks(d_sae: int) -> Iterator[slice]:
    return (slice(start, min(start + FEATURES_AT_ONCE, d_sae)) for start in range(0, d_sae, FEATURES_AT_ONCE))


def _logit_panels(weights: Float[Tensor, "n d_vocab"]) -> dict[str, np.ndarray]:
    count = min(TOP_LOGITS, weights.shape[1])
    top, top_id = weights.topk(count, dim=-1)
    bottom, bottom_id = weights.topk(count, dim=-1, largest=False)
    low, high = weights.amin(-1), weights.amax(-1)
    width = (high - low).clamp_min(1e-12)[:, None]
    bucket = ((weights - low[:, None]) / width * LOGIT_BUCKETS).long().clamp_max(LOGIT_BUCKETS - 1)
    histogram = torch.zeros(len(weights), LOGIT_BUCKETS, dtype=torch.int64)
    histogram.scatter_add_(1, bucket, torch.ones_like(bucket))
    centred = (weights - weights.mean(-1, keepdim=True)).double()
    kurtosis = centred.pow(4).mean(-1) / centred.pow(2).mean(-1).clamp_min(1e-24).pow(2)
    return {
        "logits/top_id": top_id.int().numpy(),
        "logits/top_value": top.numpy(),
        "logits/bottom_id": bottom_id.int().numpy(),
        "logits/bottom_value": bottom.numpy(),
        "logits/histogram": histogram.numpy().astype(np.uint32),
        "logits/range": torch.stack([low, high], -1).numpy(),
        "stats/logit_kurtosis": kurtosis.float().numpy(),
    }


def _neuron_panels(W_dec: Float[Tensor, "n d_in"]) -> dict[str, np.ndarray]:
    _, ids = W_dec.abs().topk(min(NEURONS, W_dec.shape[1]), dim=-1)
    values = W_dec.gather(1, ids)
    share = values.abs() / W_dec.abs().sum(-1, keepdim=True).clamp_min(1e-12)
    return {
        "neurons/weight_id": ids.int().numpy(),
        "neurons/weight_value": values.numpy(),
        "neurons/weight_share": share.numpy(),
    }


def _neighbour_panels(unit: Float[Tensor, "d_sae d_in"], chunk: slice) -> dict[str, np.ndarray]:
    cosines = unit[chunk] @ unit.T
    own = torch.arange(chunk.start, chunk.stop)
    cosines[torch.arange(len(own)), own] = -2.0  # a feature is no neighbour of itself
    values, ids = cosines.topk(min(NEIGHBOURS, unit.shape[0] - 1), dim=-1)
    nearest = values[:, 0] if values.shape[1] else torch.zeros(len(own))
    return {
        "neighbours/id": ids.int().numpy(),
        "neighbours/cosine": values.numpy(),
        "stats/nearest_cosine": nearest.numpy(),
    }
