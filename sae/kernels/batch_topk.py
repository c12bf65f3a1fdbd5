"""The k · rows largest of a batch, for kernels that find what lies above a threshold without a dense product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels import reference
from sae.kernels.sparsity import BatchTopK, NotSparse, Support

SAMPLED_ROWS = 64

Above = Callable[[Float[Tensor, " d_sae"]], tuple[Support, Float[Tensor, " nnz"]]]


def batch_topk(
    x: Float[Tensor, "rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    bias: Float[Tensor, " d_sae"],
    rule: BatchTopK,
    above: Above,
) -> tuple[Support, Float[Tensor, " nnz"]]:
    """The k · rows largest; `above(threshold)` finds the entries above one threshold per feature.

    Falls back to one dense product in the rare batch that has a row with too many entries for `above` (NotSparse).
    """
    try:
        return _above_floor(x, W_enc, bias, rule, above)
    except NotSparse:
        return reference.select(x, W_enc, bias, rule)


def _above_floor(
    x: Tensor, W_enc: Tensor, bias: Tensor, rule: BatchTopK, above: Above
) -> tuple[Support, Float[Tensor, " nnz"]]:
    """Everything above a floor guessed from some rows; the floor is lowered until k · rows entries lie above it."""
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
    """A boolean vector that is true for the `count` largest values; of equal ones the first."""
    threshold = values.topk(count, sorted=False).values.amin()
    above = values > threshold
    ties = (values == threshold).nonzero().squeeze(-1)[: count - int(above.sum())]
    above[ties] = True
    return above
