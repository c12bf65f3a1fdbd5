"""Loss terms as plain functions: squared errors are summed over d_in and averaged over the batch."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels.acts import FeatureActs
from sae.kernels.ops import take_features
from sae.model import SAE


def squared_error(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """`mean over rows of ‖x − x̂‖²`."""
    return (x - x_hat).pow(2).sum(-1).mean()


def l1_norm(acts: FeatureActs) -> Float[Tensor, ""]:
    """`mean over rows of Σ f`; f is non-negative. Source: Bricken et al. 2023."""
    return acts.total() / acts.n_rows


def aux_k_loss(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"],
) -> Float[Tensor, ""]:
    """What the error keeps of its variance after the strongest dead features have tried to explain it.

    `‖e − ê‖² / ‖e − mean e‖²`, ê from the k_aux = min(d_in/2, dead) largest dead pre-activations, e detached.
    Units: none; about 1 means the dead features explain nothing. Zero when nothing is dead or e has no variance.
    Source: Gao et al. 2024 (arXiv 2406.04093), A.2.
    """
    features = dead.nonzero().squeeze(-1)
    target = error.detach()
    variance = (target - target.mean(0)).pow(2).sum()
    if not len(features) or not variance > 0:
        return x.new_zeros(())
    # Dense over the dead alone: so many of them are taken that a sparse product would cost more.
    W_enc, W_dec = take_features(sae.W_enc, features, 1), take_features(sae.W_dec, features, 0)
    acts = (x @ W_enc + (sae.b_enc[features] - sae.b_dec @ W_enc)).relu()
    k_aux = min(sae.d_in // 2, len(features))
    if k_aux < len(features):
        values, columns = acts.topk(k_aux, dim=-1, sorted=False)
        acts = torch.zeros_like(acts).scatter(-1, columns, values)
    return torch.nan_to_num((target - acts @ W_dec).pow(2).sum() / variance)
