"""What pretraining measures on held-out text: the loss, and how sparse the neurons are.

Where a few neurons per token carry all that the MLP does, its activations are not in superposition, and a dictionary
has nothing to find.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from sae.lm.transformer import Hook, Transformer, no_hook
from sae.lm.units import active_units, largest_units, participation_ratio

CONTEXTS_AT_ONCE = 16
LARGEST = 10


class NeuronFigures(TypedDict):
    """Means over the tokens of a held-out text, of one MLP layer.

    `dead` is the share of neurons that are 0 on all of these tokens. `ce_gap` = CE_zero − CE in nats, with the whole
    layer set to 0. `score_zero_top10` = (CE_zero − CE_top10) / (CE_zero − CE), where only the ten largest neurons of
    each token keep their activation; 1 means that nothing is lost. It is missing where ce_gap is not positive.
    """

    l0: float
    dead: float
    participation_ratio: float
    ce_gap: float
    score_zero_top10: float | None


def held_out_contexts(tokens: np.ndarray, context_tokens: int, max_contexts: int) -> Int[Tensor, "contexts next_pos"]:
    """Up to `max_contexts` pieces of `context_tokens` + 1 tokens, spread evenly over the text."""
    width = context_tokens + 1
    whole = len(tokens) // width
    starts = width * np.unique(np.linspace(0, whole - 1, min(max_contexts, whole)).astype(np.int64))
    pieces = [np.asarray(tokens[start : start + width]).astype(np.int64) for start in starts]
    return torch.from_numpy(np.stack(pieces) if pieces else np.empty((0, width), np.int64))


@torch.no_grad()
def held_out_loss(model: Transformer, contexts: Int[Tensor, "contexts next_pos"]) -> float:
    """Mean loss in nats per token; NaN without contexts."""
    if not len(contexts):
        return math.nan
    losses = [_loss_sum(model, chunk) for chunk in contexts.split(CONTEXTS_AT_ONCE)]  # type: ignore[no-untyped-call]
    return sum(losses) / contexts[:, 1:].numel()


@torch.no_grad()
def neuron_figures(model: Transformer, contexts: Int[Tensor, "contexts next_pos"]) -> list[NeuronFigures]:
    """The figures of each MLP layer on `contexts`, whose last token is only a target; empty without MLP or contexts."""
    layers = 0 if model.config.attn_only or not len(contexts) else model.config.n_layers
    return [_layer_figures(model, contexts, f"blocks.{layer}.mlp.hook_post") for layer in range(layers)]


def _layer_figures(model: Transformer, contexts: Int[Tensor, "contexts next_pos"], hook_point: str) -> NeuronFigures:
    sums = torch.zeros(5, dtype=torch.float64)
    fired = torch.zeros(model.config.d_mlp, dtype=torch.bool)
    for chunk in contexts.split(CONTEXTS_AT_ONCE):  # type: ignore[no-untyped-call]
        neurons = Neurons(hook_point)
        losses = [_loss_sum(model, chunk, partial(neurons.edit, largest=kept)) for kept in (None, 0, LARGEST)]
        x = neurons.x.flatten(0, 1)
        sums += torch.tensor([*losses, active_units(x).sum(), participation_ratio(x).sum()], dtype=torch.float64)
        fired |= (x != 0).any(0)
    clean, zero, top10, l0, ratio = (sums / contexts[:, 1:].numel()).tolist()
    gap = zero - clean
    return {
        "l0": round(l0, 2),
        "dead": round(1 - fired.double().mean().item(), 4),
        "participation_ratio": round(ratio, 2),
        "ce_gap": round(gap, 4),
        "score_zero_top10": round((zero - top10) / gap, 4) if gap > 0 else None,
    }


class Neurons:
    """Keeps the activations at a hook point, and all of them, none, or the largest for the rest of the model."""

    def __init__(self, hook_point: str) -> None:
        self.hook_point = hook_point

    def edit(self, name: str, x: Tensor, *, largest: int | None) -> Tensor:
        if name != self.hook_point:
            return x
        if largest is None:
            self.x = x
            return x
        return largest_units(x, largest)


def _loss_sum(model: Transformer, contexts: Int[Tensor, "contexts next_pos"], hook: Hook = no_hook) -> float:
    logits = model(contexts[:, :-1], hook)
    return F.cross_entropy(logits.flatten(0, 1), contexts[:, 1:].flatten(), reduction="sum").item()
