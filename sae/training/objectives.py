"""What each recipe minimises: one short function each, composed of terms from `losses`.

All in scaled units, where E‖x‖² = d_in. A function takes the dictionary, a scaled batch and the step's context, and
returns the loss, its squared error and the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sae.dictionary.autoencoder import SAE
from sae.kernels.activations import DenseActs, FeatureActs, SparseActs, sparse_or_dense
from sae.kernels.autograd import Kernels
from sae.kernels.sparsity import Above, Rule, TopK
from sae.parallel.mesh import ONE, Mesh
from sae.parallel.selection import largest_acts
from sae.training import losses
from sae.training.config import TrainConfig
from sae.training.rows import Downstream

MULTI_K_WEIGHT = 1 / 8
KL_ROWS = 512  # rows whose logits are held at once


class ScaledBatch(NamedTuple):
    """A batch in scaled units; `target` is x, or a transcoder's y; `resid` stays in the model's own units."""

    x: Float[Tensor, "rows d_in"]
    target: Float[Tensor, "rows d_out"]
    resid: Float[Tensor, "rows d_model"] | None = None


@dataclass(frozen=True)
class StepContext:
    """What a loss depends on at one step besides the parameters and the batch."""

    config: TrainConfig
    kernels: Kernels
    coefficient: float | Tensor  # λ of this step; a tensor where it is known on the device only
    sparse: bool  # whether so few features were active at the last step that sparse products are faster
    dead: Bool[Tensor, " d_sae"]
    p: float | Tensor = 1.0
    scale: float = 1.0
    downstream: Downstream | None = None
    site_widths: tuple[int, ...] = ()  # of a crosscoder's rows
    mesh: Mesh = ONE


class Outcome(NamedTuple):
    """`error` is the mean squared error of x̂ (or ŷ), whatever the loss; `penalty` is what λ multiplies."""

    loss: Float[Tensor, ""]
    error: Float[Tensor, ""]
    acts: FeatureActs
    penalty: Float[Tensor, ""] | None = None


Objective = Callable[[SAE, ScaledBatch, StepContext], Outcome]


def pre_activations(sae: SAE, x: Tensor, rule: Rule, context: StepContext) -> FeatureActs:
    """`(x − b_dec) W_enc + b_enc` of the features that the rule makes active, or of all where dense is faster."""

    x = sae.gathered(x)

    def dense() -> DenseActs:
        return DenseActs(sae.pre_acts(x))

    if isinstance(rule, Above) and not context.sparse:
        return dense()
    encoder = (sae.W_enc, sae.b_enc, sae.input_bias)
    return sparse_or_dense(lambda: SparseActs.pre_activations(context.kernels, x, *encoder, rule), dense)


def activations(sae: SAE, x: Tensor, context: StepContext) -> FeatureActs:
    """`sae.encode(sae.gathered(x))`, sparse or, where that is faster, dense."""
    x = sae.gathered(x)
    if isinstance(sae.rule, Above) and not context.sparse:
        return sae.encode_dense(x)
    return sae.feature_acts(x, context.kernels)


def l1(sae: SAE, batch: ScaledBatch, context: StepContext) -> Outcome:
    """`‖y − ŷ‖² + λ Σ f`. Source: Bricken et al. 2023; for transcoders Dunefsky et al. 2024 (arXiv 2406.11944)."""
    acts = activations(sae, batch.x, context)
    error = losses.squared_error(batch.target, sae.output(acts, batch.x))
    penalty = context.mesh.over_shards(losses.l1_norm(acts))
    if not isinstance(context.coefficient, Tensor) and not context.coefficient:
        return Outcome(error, error, acts, penalty)
    return Outcome(error + context.coefficient * penalty, error, acts, penalty)


def l1_of_norms(sae: SAE, batch: ScaledBatch, context: StepContext) -> Outcome:
    """`‖x − x̂‖² + λ Σ f ‖d‖`. Source: Anthropic, April 2024 update, in the form of Templeton et al. 2024."""
    acts = activations(sae, batch.x, context)
    error = losses.squared_error(batch.target, sae.output(acts, batch.x))
    penalty = context.mesh.over_shards(losses.l1_norm(acts, sae.W_dec.norm(dim=-1)))
    return Outcome(error + context.coefficient * penalty, error, acts, penalty)


def l1_of_site_norms(sae: SAE, batch: ScaledBatch, context: StepContext) -> Outcome:
    """`Σ_s ‖x^s − x̂^s‖² + λ Σ_i f_i Σ_s ‖d_i^s‖`, x^s the part of a row that comes from site s.

    A sum of norms, not the norm of the joined row: a feature pays for each site that it is at, so that one of a single
    site can have a decoder row of 0 at the others.
    Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
    """
    acts = activations(sae, batch.x, context)
    error = losses.squared_error(batch.target, sae.output(acts, batch.x))
    parts = torch.split(sae.W_dec, list(context.site_widths), dim=-1)
    norms = torch.stack([part.norm(dim=-1) for part in parts]).sum(0)
    penalty = context.mesh.over_shards(losses.l1_norm(acts, norms))
    return Outcome(error + context.coefficient * penalty, error, acts, penalty)


def annealed_lp(sae: SAE, batch: ScaledBatch, context: StepContext) -> Outcome:
    """`‖x − x̂‖² + λ Σ f^p`, p falling from 1. Source: Karvonen et al. 2024 (arXiv 2408.00113)."""
    acts = activations(sae, batch.x, context)
    error = losses.squared_error(batch.target, sae.output(acts, batch.x))
    penalty = context.mesh.over_shards(losses.lp_norm(acts, context.p))
    return Outcome(error + context.coefficient * penalty, error, acts, penalty)


def gated(sae: SAE, batch: ScaledBatch, context: StepContext) -> Outcome:
    """`‖x − x̂(f)‖² + λ Σ ReLU(π) + ‖x − x̂_frozen(ReLU(π))‖²`, π the gate's pre-activations, f = 1[π > 0] · magnitude.

    The decoder is a constant in the last term, which teaches the gate to find the right features.
    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), eq. 8.
    """
    pre = pre_activations(sae, batch.x, sae.rule, context)
    gate = pre.with_values(pre.values.relu())
    features = pre.support.features.long() if isinstance(pre, SparseActs) else None
    acts = pre.with_values(torch.where(pre.values > 0, sae.magnitudes(pre.values, features), 0.0))
    x_hat, by_gate = context.mesh.scatter_sums([acts.decode(sae.W_dec), gate.decode(sae.W_dec.detach())])
    error = losses.squared_error(batch.target, x_hat + sae.b_dec)
    by_gate = by_gate + sae.b_dec.detach()
    penalty = context.mesh.over_shards(losses.l1_norm(gate))
    loss = error + context.coefficient * penalty + losses.squared_error(batch.target, by_gate)
    return Outcome(loss, error, acts, penalty)


def jumprelu(sae: SAE, batch: ScaledBatch, context: StepContext) -> Outcome:
    """`‖x − x̂‖² + λ L0` with learned thresholds. Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), eq. 9."""
    bandwidth = context.config.bandwidth
    # Entries up to half a bandwidth below the threshold are not active, but they move the threshold.
    rule = Above(sae.threshold.detach() - bandwidth / 2)
    acts, l0 = losses.jump(pre_activations(sae, batch.x, rule, context), sae.threshold, bandwidth)
    error = losses.squared_error(batch.target, sae.output(acts, batch.x))
    l0 = context.mesh.over_shards(l0)
    return Outcome(error + context.coefficient * l0, error, acts, l0)


def topk(sae: SAE, batch: ScaledBatch, context: StepContext) -> Outcome:
    """`‖x − x̂‖² (+ ‖x − x̂_{m·k}‖² / 8 where multi_k = m) + AuxK`; also for k · rows of a batch (Bussmann et al. 2024).

    Source: Gao et al. 2024 (arXiv 2406.04093), §2.4 and A.2; Multi-TopK with m = 4 and weight 1/8 in §A.
    """
    wide = None
    if context.config.multi_k:
        assert sae.k is not None
        wide = _largest(sae, batch.x, min(context.config.d_sae, context.config.multi_k * sae.k), context)
        acts = largest_acts(context.mesh, wide, sae.k)
    else:
        acts = activations(sae, batch.x, context)
    x_hat = sae.output(acts, batch.x)
    error = loss = losses.squared_error(batch.target, x_hat)
    if wide is not None:
        loss = loss + MULTI_K_WEIGHT * losses.squared_error(batch.target, sae.output(wide, batch.x))
    return Outcome(_with_aux(loss, sae, batch, x_hat, context), error, acts)


def matryoshka(sae: SAE, batch: ScaledBatch, context: StepContext) -> Outcome:
    """`Σ over prefixes m of ‖x − x̂_{1…m}‖² + AuxK`, x̂_{1…m} from the first m features and b_dec alone.

    Source: Bussmann et al. 2025 (arXiv 2503.17547), eq. 3.
    """
    acts = activations(sae, batch.x, context)
    x_hat: Tensor = sae.b_dec
    loss: Tensor = batch.x.new_zeros(())
    first = context.mesh.features(context.config.d_sae).start
    ends = [max(0, end - first) for end in (0, *context.config.prefix_sizes)]  # in this shard's own numbers
    for part in context.mesh.scatter_sums([acts.prefix(*ends).decode(sae.W_dec) for ends in pairwise(ends)]):
        x_hat = x_hat + part
        error = losses.squared_error(batch.target, x_hat)
        loss = loss + error
    return Outcome(_with_aux(loss, sae, batch, x_hat, context), error, acts)


def end_to_end(sae: SAE, batch: ScaledBatch, context: StepContext) -> Outcome:
    """`mean KL(p(x) ‖ p(x̂)) + λ Σ f`, p the model's next-token distribution from the hook point on.

    Source: Braun et al. 2024 (arXiv 2405.12241).
    """
    assert context.downstream is not None
    assert batch.resid is not None
    acts = activations(sae, batch.x, context)
    x_hat = sae.output(acts, batch.x)
    kl = batch.x.new_zeros(())
    for rows in torch.split(torch.arange(len(batch.x)), KL_ROWS):  # only one chunk's logits are in memory at a time
        arguments = (batch.x[rows], x_hat[rows], batch.resid[rows], context.downstream, context.scale)
        kl = kl + checkpoint(divergence, *arguments, use_reentrant=False)
    penalty = context.mesh.over_shards(losses.l1_norm(acts))
    loss = kl / len(batch.x) + context.coefficient * penalty
    return Outcome(loss, losses.squared_error(batch.target, x_hat), acts, penalty)


def divergence(x: Tensor, x_hat: Tensor, resid: Tensor, downstream: Downstream, scale: float) -> Tensor:
    """`Σ over rows of KL(p(x) ‖ p(x̂))`, x and x̂ in scaled units."""
    with torch.no_grad():
        clean = downstream(x / scale, resid)
    return losses.kl_divergence(clean, downstream(x_hat / scale, resid))


def _largest(sae: SAE, x: Tensor, k: int, context: StepContext) -> FeatureActs:
    """The activations of a TopK dictionary with this k."""
    pre = pre_activations(sae, x, TopK(k), context)
    return pre if isinstance(pre, SparseActs) else pre.with_values(pre.values.relu()).largest_of_rows(k)


def _with_aux(loss: Tensor, sae: SAE, batch: ScaledBatch, x_hat: Tensor, context: StepContext) -> Tensor:
    if not context.config.aux_coefficient:
        return loss
    # Gao et al. add AuxK to a squared error divided by the variance. Ours is not divided, so AuxK is multiplied by it.
    average = context.mesh.average
    variance = average((batch.target - average(batch.target.mean(0))).pow(2).sum(-1).mean()).detach()
    aux = losses.aux_k_loss(sae, batch.x, batch.target - x_hat, context.dead, context.kernels, context.mesh)
    return loss + context.config.aux_coefficient * (aux * variance)
