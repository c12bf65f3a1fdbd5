"""The k · rows largest entries of a batch, for backends that find all entries above a threshold without a dense
product in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels import reference
from sae.kernels.sparsity import BatchTopK, NotSparse, PreparedEncoder, Support

SAMPLED_ROWS = 64

FindAbove = Callable[[Tensor], tuple[Support, Tensor]]  # threshold [d_sae] → entries above it, pre-activations [nnz]


def batch_topk(
    x: Float[Tensor, "rows d_in"],
    encoder: PreparedEncoder,
    bias: Float[Tensor, " d_sae"],
    rule: BatchTopK,
    above: FindAbove,
) -> tuple[Support, Float[Tensor, " nnz"]]:
    """The k · rows largest entries under `rule`; `above` finds the entries above one threshold per feature.

    Falls back to one dense product in the rare batch that has a row with too many entries for `above` (NotSparse).
    """
    try:
        return _above_floor(x, encoder.W_enc, bias, rule, above)
    except NotSparse:
        return reference.select(x, reference.prepare(encoder.W_enc), bias, rule)


def _above_floor(
    x: Tensor, W_enc: Tensor, bias: Tensor, rule: BatchTopK, above: FindAbove
) -> tuple[Support, Float[Tensor, " nnz"]]:
    """Guesses a floor from a sample of rows, lowers it until k · rows entries lie above it, and keeps the largest."""
    wanted, lift = rule.k * len(x), rule.lifts(bias)
    sampled = rule.rank(torch.addmm(bias, x[:: max(1, len(x) // SAMPLED_ROWS)], W_enc)).flatten()
    share = 1.25
    while True:
        rank = int(share * rule.k * len(sampled) / len(bias))
        floor = sampled.topk(rank).values[-1].clamp_min(0.0) if 0 < rank < len(sampled) else bias.new_zeros(())
        support, pre = above((floor - lift).clamp_min(0.0))
        if len(pre) >= wanted or floor == 0:
            break
        share *= 1.5
    if len(pre) <= wanted:
        return support, pre
    kept = largest(pre + lift[support.features.long()], wanted)
    return support.where(kept), pre[kept]


def largest(values: Float[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """True for the `count` largest values; among equal values the first are taken."""
    threshold = values.topk(count, sorted=False).values.amin()
    above = values > threshold
    ties = (values == threshold).nonzero().squeeze(-1)[: count - int(above.sum())]
    above[ties] = True
    return above
