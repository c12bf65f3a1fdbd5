"""Loss terms as plain functions: squared errors are summed over d_in and averaged over the batch."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels import reference as kernels
from sae.model import SAE


def squared_error(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """`mean over rows of ‖x − x̂‖²`."""
    return (x - x_hat).pow(2).sum(-1).mean()


def l1_norm(feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    """`mean over rows of Σ f`; f is non-negative. Source: Bricken et al. 2023."""
    return feature_acts.sum(-1).mean()


def aux_k_loss(
    sae: SAE,
    pre: Float[Tensor, "batch d_sae"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"],
) -> Float[Tensor, ""]:
    """What the error keeps of its variance after the strongest dead features have tried to explain it.

    `‖e − ê‖² / ‖e − mean e‖²`, ê from the k_aux = min(d_in/2, dead) largest dead pre-activations, e detached.
    Units: none; about 1 means the dead features explain nothing. Zero when nothing is dead or e has no variance.
    Source: Gao et al. 2024 (arXiv 2406.04093), A.2.
    """
    dead_features = dead.nonzero().squeeze(-1)
    if not len(dead_features):
        return pre.new_zeros(())
    target = error.detach()
    variance = (target - target.mean(0)).pow(2).sum()
    if not variance > 0:
        return pre.new_zeros(())
    k_aux = min(sae.d_in // 2, len(dead_features))
    values, columns = kernels.topk(pre[:, dead_features], k_aux)
    explained = kernels.sparse_decode(values, columns, sae.W_dec[dead_features])
    return torch.nan_to_num((target - explained).pow(2).sum() / variance)
