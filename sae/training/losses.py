"""Loss terms: squared errors are summed over d_in and averaged over the batch."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.kernels.activations import DenseActs, FeatureActs, SparseActs, sparse_or_dense
from sae.kernels.autograd import Kernels, take_features
from sae.kernels.sparsity import TopK
from sae.parallel.mesh import ONE, Mesh
from sae.parallel.selection import largest_acts

LP_EPSILON = 1e-2  # in scaled units, where active features are about 1 to 10
AUX_SPARSE_BELOW = 1 / 8  # of the dead features: with more per row, sparse products cost as much as dense ones


def squared_error(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """`mean over rows of ‖x − x̂‖²`."""
    return torch.nn.functional.mse_loss(x_hat, x, reduction="sum") / len(x)


def l1_norm(acts: FeatureActs, weights: Float[Tensor, " d_sae"] | None = None) -> Float[Tensor, ""]:
    """`mean over rows of Σ w f`; f is non-negative, w is 1 or one weight per feature, e.g. its decoder norm.

    Source: Bricken et al. 2023; with w = ‖d‖: Anthropic, April 2024 update.
    """
    total = acts.total() if weights is None else (acts.values * acts.of_feature(weights)).sum()
    return total / acts.n_rows


def lp_norm(acts: FeatureActs, p: float | Tensor) -> Float[Tensor, ""]:
    """`mean over rows of Σ (f + ε)^p − ε^p` with ε = LP_EPSILON, which keeps the slope at 0 finite; p = 1 is L1.

    Source: Karvonen et al. 2024 (arXiv 2408.00113), Σ f^p.
    """
    at_zero: float | Tensor = LP_EPSILON**p
    return ((acts.values + LP_EPSILON).pow(p) - at_zero).sum() / acts.n_rows


def jump(pre: FeatureActs, threshold: Float[Tensor, " d_sae"], bandwidth: float) -> tuple[FeatureActs, Tensor]:
    """JumpReLU activations `pre · H(pre − θ)` and the mean L0 `Σ H(pre − θ)`, with pseudo-gradients for θ.

    With K(u) = 1 for |u| < ½: `∂f/∂θ = −(θ/ε) K((pre − θ)/ε)`, `∂H/∂θ = −(1/ε) K((pre − θ)/ε)`, ε the bandwidth in the
    units of pre. pre has the ordinary gradient of f and none of H. `pre` must contain all entries above θ − ε/2.
    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), eq. 11 and 12.
    """
    own = pre.of_feature(threshold)
    fixed, at = own.detach(), pre.values.detach()
    near = ((at - fixed).abs() < bandwidth / 2).to(at.dtype) / bandwidth
    ste = near * (fixed - own)  # zero, with the gradient −K/ε
    active = (at > fixed).to(at.dtype)
    return pre.with_values(pre.values * active + fixed * ste), (active + ste).sum() / pre.n_rows


def kl_divergence(
    clean_logits: Float[Tensor, "rows d_vocab"], logits: Float[Tensor, "rows d_vocab"]
) -> Float[Tensor, ""]:
    """`Σ over rows of KL(p_clean ‖ p)` in nats."""
    clean, found = clean_logits.log_softmax(-1), logits.log_softmax(-1)
    return torch.nn.functional.kl_div(found, clean, reduction="sum", log_target=True)


def aux_k_loss(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"],
    kernels: Kernels,
    mesh: Mesh = ONE,
) -> Float[Tensor, ""]:
    """The share of the error's variance that the strongest dead features leave unexplained.

    `‖e − ê‖² / ‖e − mean e‖²`, ê from the k_aux = min(d_in/2, dead) largest dead pre-activations, e detached.
    Without unit; about 1 means that the dead features explain nothing. 0 if no feature is dead or e has no variance.
    On a mesh each rank passes its own rows and the dead features of its shard; the mean over ranks is the loss.
    Source: Gao et al. 2024 (arXiv 2406.04093), A.2.
    """
    features = dead.nonzero().squeeze(-1)
    target = error.detach()
    variance = mesh.average((target - mesh.average(target.mean(0))).pow(2).sum())
    n_dead = int(mesh.reduce(torch.tensor(len(features)), "sum", "features"))
    if not n_dead or not variance > 0:
        return x.new_zeros(())
    W_enc, W_dec = take_features(sae.W_enc, features, 1), take_features(sae.W_dec, features, 0)
    k_aux = min(sae.d_in // 2, n_dead)
    dense = x.is_cuda or k_aux >= AUX_SPARSE_BELOW * n_dead
    acts = _largest(sae.gathered(x), W_enc, sae.b_enc[features], sae.input_bias, k_aux, kernels, mesh, dense=dense)
    return torch.nan_to_num((target - mesh.scatter_sum(acts.decode(W_dec))).pow(2).sum() / variance)


def _largest(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, kernels: Kernels, mesh: Mesh, *, dense: bool
) -> FeatureActs:
    """The k largest of each row over all shards, where positive: sparse on a CPU if they are few of many."""

    def all_of_them() -> DenseActs:
        acts = DenseActs((x @ W_enc + (b_enc - b_dec @ W_enc)).relu())
        return largest_acts(mesh, acts, k)

    if dense:
        return all_of_them()
    return sparse_or_dense(lambda: SparseActs.pre_activations(kernels, x, W_enc, b_enc, b_dec, TopK(k)), all_of_them)
