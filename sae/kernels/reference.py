"""Plain-torch operations on sparse features: the specification every faster path is tested against."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pre_acts(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_sae"]:
    """`(x − b_dec) W_enc + b_enc`, with the pre-bias folded into a [d_sae] vector.

    The fold changes no gradient, and spares the [batch, d_in] one that `x − b_dec` would ask for.
    """
    return torch.addmm(b_enc - b_dec @ W_enc, x, W_enc)


def topk(pre: Float[Tensor, "batch d_sae"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest pre-activations of each row, clipped at zero, and their features."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return values.relu(), indices


def scatter(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], d_sae: int
) -> Float[Tensor, "batch d_sae"]:
    """The dense feature activations that sparse values stand for."""
    dense = values.new_zeros((values.shape[0], d_sae))
    return dense.scatter(-1, indices, values)


def sparse_decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "batch d_in"]:
    """`Σ_j values_j · W_dec[indices_j]`: the decoder product at the cost of the active features."""
    return torch.nn.functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")
