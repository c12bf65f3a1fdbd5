"""The feature index: every activation of every feature, and the panels of its page, in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import cosines_with_others, head_shares, unit
from sae.dictionary.inference import FrozenSAE
from sae.indexing import ablation_effects, co_activation, rules
from sae.indexing import map as feature_map
from sae.indexing.correlation import NEURONS, FeatureNeuronCorrelation
from sae.indexing.firings import Firings
from sae.jobs.progress import progress
from sae.kernels.activations import SparseActs
from sae.lm import LanguageModel
from sae.parallel.mesh import ONE, Mesh
from store.common import read_ahead

TOP_LOGITS = 20
LOGIT_BUCKETS = 40
NEIGHBOURS = 10
FEATURES_AT_ONCE = 512

Panels = dict[str, np.ndarray]  # by name (`logits/top_id`): one row per feature


class IndexBlock(NamedTuple):
    """Whole contexts, numbered as in the index; `document` holds row numbers of the index's own document table."""

    first_context: int
    acts: Float[Tensor, "rows d_in"]
    tokens: Integer[np.ndarray, "contexts seq_len"]
    keep: Bool[np.ndarray, "contexts seq_len"]
    document: Integer[np.ndarray, "contexts seq_len"]


@runtime_checkable
class IndexSink(Protocol):
    """Takes activations in any order, then the finished panels; `store.features.FeatureWriter` is one."""

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
    model: LanguageModel | None,
    blocks: Iterable[IndexBlock],
    sink: IndexSink,
    *,
    hook_point: str,
    tokens: int,
    resampled: Mapping[int, int] | None = None,
    device: str = "auto",
    kernels: str = "auto",
) -> Path:
    """Encodes every block once, then adds the panels; returns the path of the index.

    `sae.indexing.over_ranks.index` does the same with several processes, or in less memory.

    `hook_point` is where the decoder writes: where x was read or, for a transcoder, its target.
    Without a model there are no panels of its losses and logits.
    `resampled` gives the step of a feature's last resampling, stored as `stats/resampled_step` (-1: never).
    """
    correlation = FeatureNeuronCorrelation(sae.d_sae, sae.d_in)
    with progress("index", tokens, "tok") as bar:
        for block, fired in encoded_blocks(FrozenSAE(sae, device, kernels), blocks):
            _append(sink, block, fired)
            correlation.add(fired, block.acts, torch.from_numpy(block.keep.reshape(-1)))
            bar.update(block.tokens.size)
    panels = weight_panels(sae, model, hook_point) | correlation.panels()
    return finished(sae, model, sink, panels, hook_point, resampled)


def encoded_blocks(placed: FrozenSAE, blocks: Iterable[IndexBlock]) -> Iterator[tuple[IndexBlock, SparseActs]]:
    """Blocks with their activations above zero in kept rows; the next one is encoded while one is in use."""

    @torch.inference_mode()
    def encoded(block: IndexBlock) -> tuple[IndexBlock, SparseActs]:
        return block, placed.encode(block.acts).firings(torch.from_numpy(block.keep.reshape(-1)))

    return read_ahead(encoded, blocks)


def finished(
    sae: SAE,
    model: LanguageModel | None,
    sink: IndexSink,
    panels: Panels,
    hook_point: str,
    resampled: Mapping[int, int] | None,
) -> Path:
    """Adds what follows from all activations together; returns the path of the index."""

    def from_firings(firings: Firings) -> Panels:
        effects = ablation_effects.panels(sae, model, firings, hook_point) if model else {}
        return co_activation.panels(firings) | rules.panels(firings) | effects

    panels["stats/resampled_step"] = _resampled_step(sae.d_sae, resampled or {})
    return sink.finish(panels, from_firings)


def _append(sink: IndexSink, block: IndexBlock, fired: SparseActs) -> None:
    sink.append(
        block.first_context,
        block.tokens,
        block.keep,
        block.document,
        fired.support.rows.numpy() + block.first_context * block.tokens.shape[1],
        fired.support.features.numpy(),
        fired.values.numpy(),
    )


def _resampled_step(d_sae: int, resampled: Mapping[int, int]) -> Int[np.ndarray, " d_sae"]:
    steps = np.full(d_sae, -1, np.int32)
    for feature, step in resampled.items():
        steps[feature] = step
    return steps


def weight_panels(sae: SAE, model: LanguageModel | None, hook_point: str, mesh: Mesh = ONE) -> Panels:
    """The panels that follow from the weights alone: logit weights, neurons, nearest features, map.

    A dictionary of head outputs has `heads/share`, the share of each head in a feature's decoder row.
    Without a linear path from `hook_point` to the logits there are no logit weights.
    A transcoder has no `neurons/weight_*` (its decoder does not write to neurons of x) and no `stats/cos_enc_dec` (its
    encoder and decoder directions lie in different spaces).
    On a `mesh` the ranks share the features, and rank 0 alone returns the panels.
    """
    parts: dict[str, list[np.ndarray]] = {}
    directions, has_path = unit(sae.W_dec), model is not None and model.why_no_path(hook_point) is None
    for rows in _chunks(sae.d_sae)[mesh.rank :: mesh.world]:
        W_dec = sae.W_dec[rows]
        found = _neighbour_panels(directions, rows)
        if model and has_path:
            weights = model.logit_weights(W_dec.to(model.device), hook_point)
            found |= _logit_panels(model.of_tokens(weights).cpu(), model.token_ids)
        if not sae.is_transcoder:
            found |= _neuron_panels(W_dec)
        if model and hook_point.endswith(".attn.hook_z"):
            found["heads/share"] = head_shares(W_dec, model.n_heads).numpy()
        for name, array in found.items():
            parts.setdefault(name, []).append(array)
    if mesh.world > 1:
        like = mesh.tell({name: [str(arrays[0].dtype), *arrays[0].shape[1:]] for name, arrays in parts.items()})
        empty = {name: np.empty((0, *shape), dtype) for name, (dtype, *shape) in like.items()}
        parts = {name: mesh.in_order(parts.get(name, []), empty[name]) for name in like}
        if not mesh.is_first:
            return {}
    panels = {name: np.concatenate(arrays) for name, arrays in parts.items()} | feature_map.panels(sae.W_dec)
    if not sae.is_transcoder:
        panels["stats/cos_enc_dec"] = torch.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1).numpy()
    return panels


def _chunks(d_sae: int) -> list[Int[Tensor, " features"]]:
    return [torch.arange(start, min(start + FEATURES_AT_ONCE, d_sae)) for start in range(0, d_sae, FEATURES_AT_ONCE)]


def _logit_panels(weights: Float[Tensor, "n tokens"], token_ids: Int[Tensor, " tokens"]) -> Panels:
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
        "logits/top_id": token_ids[top_id].int().numpy(),
        "logits/top_value": top.numpy(),
        "logits/bottom_id": token_ids[bottom_id].int().numpy(),
        "logits/bottom_value": bottom.numpy(),
        "logits/histogram": histogram.numpy().astype(np.uint32),
        "logits/range": torch.stack([low, high], -1).numpy(),
        "stats/logit_kurtosis": kurtosis.float().numpy(),
    }


def _neuron_panels(W_dec: Float[Tensor, "n d_in"]) -> Panels:
    _, ids = W_dec.abs().topk(min(NEURONS, W_dec.shape[1]), dim=-1)
    values = W_dec.gather(1, ids)
    share = values.abs() / W_dec.abs().sum(-1, keepdim=True).clamp_min(1e-12)
    return {
        "neurons/weight_id": ids.int().numpy(),
        "neurons/weight_value": values.numpy(),
        "neurons/weight_share": share.numpy(),
    }


def _neighbour_panels(directions: Float[Tensor, "d_sae d_in"], rows: Int[Tensor, " n"]) -> Panels:
    values, ids = cosines_with_others(directions, rows).topk(min(NEIGHBOURS, len(directions) - 1), dim=-1)
    nearest = values[:, 0] if values.shape[1] else torch.zeros(len(rows))
    return {
        "neighbours/id": ids.int().numpy(),
        "neighbours/cosine": values.numpy(),
        "stats/nearest_cosine": nearest.numpy(),
    }
