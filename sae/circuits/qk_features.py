"""Which pairs of parts make an attention head read from a token: features (and the rest) at both ends of q·k.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (QK circuit), with features as parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.circuits.parts import Parts, stream_parts
from sae.dictionary.autoencoder import SAE
from sae.lm import LanguageModel, ModelError, layer_of

DRAWS = 400
CONSTANT = "bias"  # of the query


class Total(NamedTuple):
    """A sum over pairs; 95% of dictionaries with random directions of equal norm give less in size than `random_95`."""

    value: float
    random_95: float


@dataclass(frozen=True, eq=False)
class QkPairs:
    """How much each pair of parts adds to what sets a source apart from the other sources.

    `pairs[i, j]` is q_i · κ_j / √d_head, with q_i what part i adds to the query at the destination, and κ_j what part j
    adds to the key at the source minus its mean over the other sources: softmax ignores what all sources share, so that
    the key's bias drops out. Σ pairs = `score`, the norms' scales held. `random_95`: 95% of pairs of random directions
    of equal norms are smaller in size (nan for the query's bias). `features` is the sum over pairs of features,
    `key_features` that over the whole query and features of the key.
    """

    queries: list[str]
    keys: list[str]
    pairs: Float[Tensor, "query_part key_part"]
    random_95: Float[Tensor, "query_part key_part"]
    score: float
    features: Total
    key_features: Total


@torch.inference_mode()
def qk_pairs(
    model: LanguageModel,
    sae: SAE,
    ids: Sequence[int],
    *,
    hook_point: str,
    layer: int,
    head: int,
    dst: int,
    src: int,
    seed: int = 0,
) -> QkPairs:
    """The pairs of parts behind one head's score, for a dictionary of a hook point before the layer.

    The other sources are those that the destination can read, without BOS.
    Raises: ModelError for a layer before the dictionary or a head that does not exist, or a model whose weights are not
    known by what they do; ValueError for positions that the head cannot read, or no other source.
    """
    _check(model, hook_point, layer, head)
    if not 0 <= src <= dst < len(ids):
        raise ValueError(f"qk: a head at position {dst} of {len(ids)} cannot read position {src}; it reads 0 … {dst}.")
    others = [p for p in range(dst + 1) if p != src and not (p == 0 and ids[0] == model.bos_id)]
    if not others:
        raise ValueError(f"qk: at position {dst} there is no other source to compare position {src} with.")
    seen = list(ids[: dst + 1])
    point = f"blocks.{layer}.hook_resid_pre"
    parts = stream_parts(model, seen, point=point, dictionaries={hook_point: sae})
    weights = model.weights().layers[layer]
    read_q, read_k = (
        weights.ln1.norm.transposed(W[head].T).T for W in (weights.attn.W_Q, weights.attn.W_K)
    )  # [d_model, d_head], with centring and the norm's weight
    scale = weights.ln1.norm.scale(model.capture(torch.tensor([seen]), point)[0])
    at_dst = _Written.of(parts, 1.0 / scale[dst], torch.tensor([dst]), [1.0])
    places = torch.tensor([src, *others])
    at_src = _Written.of(parts, 1.0 / scale[places], places, [1.0, *[-1.0 / len(others)] * len(others)])
    bias = weights.ln1.bias @ weights.attn.W_Q[head] + weights.attn.b_Q[head]
    root = read_q.shape[1] ** 0.5
    q = torch.cat([at_dst.vectors @ read_q, bias[None]])
    pairs = q @ (at_src.vectors @ read_k).T / root
    generator = torch.Generator().manual_seed(seed)
    circuit = (read_q @ read_k.T / root).cpu()
    u, v = (_directions(DRAWS, len(circuit), generator) for _ in range(2))
    chance = float(((u @ circuit) * v).sum(-1).abs().quantile(0.95))
    norms = torch.cat([at_dst.vectors.norm(dim=-1), torch.full((1,), torch.nan, device=q.device)])
    by_features = pairs[:, at_src.is_feature].double()
    blind = _random_dictionaries(at_dst, at_src, circuit, (q.sum(0) @ read_k.T / root).cpu(), generator)
    return QkPairs(
        [*at_dst.names, CONSTANT],
        at_src.names,
        pairs.cpu(),
        (norms[:, None] * at_src.vectors.norm(dim=-1)).cpu() * chance,
        float(pairs.double().sum()),
        Total(float(by_features[:-1][at_dst.is_feature].sum()), blind[0]),
        Total(float(by_features.sum()), blind[1]),
    )


def _check(model: LanguageModel, hook_point: str, layer: int, head: int) -> None:
    first = layer_of(hook_point) + (not hook_point.endswith("hook_resid_pre"))
    if first >= model.n_layers:
        raise ModelError(f"qk: no layer of {model.id} reads what comes after {hook_point}: it is in the last one.")
    if not first <= layer < model.n_layers:
        raise ModelError(
            f"qk: heads of layer {layer} do not read features of {hook_point}; those of layers {first} … "
            f"{model.n_layers - 1} do."
        )
    if not 0 <= head < model.n_heads:
        raise ModelError(f"qk: head {head} does not exist; {model.id} has heads 0 … {model.n_heads - 1}.")


@dataclass(frozen=True, eq=False)
class _Written:
    """What each part writes at one place, or at one minus the mean of others, over the norm's scale there."""

    names: list[str]
    vectors: Float[Tensor, "part d_model"]
    is_feature: Tensor

    @classmethod
    def of(
        cls, parts: Sequence[Parts], per_scale: Tensor, places: Int[Tensor, " place"], shares: list[float]
    ) -> _Written:
        """Σ over places of share · written / scale; features that are silent at all places are left out."""
        weight = torch.tensor(shares).to(per_scale) * per_scale.flatten()
        names: list[str] = []
        vectors, kinds = [], []
        for each in parts:
            if each.written is not None:
                found = torch.einsum("npm,p->nm", each.written[:, places.to(each.written.device)], weight)
                own = each.names
            else:
                assert each.acts is not None
                assert each.directions is not None
                acts = each.acts[places.to(each.acts.device)]
                active = (acts != 0).any(0).nonzero().flatten()
                found = (weight @ acts[:, active])[:, None] * each.directions[active]
                own = [each.names[i] for i in active.tolist()]
            names += own
            vectors.append(found)
            kinds += [each.kind == "feature"] * len(own)
        return cls(names, torch.cat(vectors), torch.tensor(kinds))


def _directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    noise = torch.randn(n, d, generator=generator)
    found: Tensor = noise / noise.norm(dim=-1, keepdim=True)
    return found


def _random_dictionaries(
    at_dst: _Written,
    at_src: _Written,
    circuit: Float[Tensor, "d_model d_model"],
    whole_query: Float[Tensor, " d_model"],
    generator: torch.Generator,
) -> tuple[float, float]:
    """95% quantiles of |Σ| over pairs of features, and over the whole query and features of the key.

    Each feature gets a random direction of equal norm, the same in query and key.
    """
    q_names, k_names = (
        [name for name, own in zip(each.names, each.is_feature.tolist(), strict=True) if own]
        for each in (at_dst, at_src)
    )
    row = {name: i for i, name in enumerate(dict.fromkeys([*q_names, *k_names]))}
    q_rows, k_rows = (torch.tensor([row[name] for name in names], dtype=torch.long) for names in (q_names, k_names))
    q_size, k_size = (each.vectors[each.is_feature].norm(dim=-1).cpu() for each in (at_dst, at_src))
    pairs, of_key = [], []
    for _ in range(DRAWS // 4):
        random = _directions(len(row), len(circuit), generator)
        q, k = (q_size[:, None] * random[q_rows]).sum(0), (k_size[:, None] * random[k_rows]).sum(0)
        pairs.append((q @ circuit @ k).abs())
        of_key.append((whole_query @ k).abs())
    return float(torch.stack(pairs).quantile(0.95)), float(torch.stack(of_key).quantile(0.95))
