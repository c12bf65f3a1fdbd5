"""Plain torch, on any device and in any precision: the specification that faster backends are tested against."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.sparsity import Above, BatchTopK, PreparedEncoder, Rule, Support, TopK

NAME = "reference"


def describe() -> str:
    """What runs, and why."""
    return "plain torch: chosen by name, or nothing faster is available on this machine"


def prepare(W_enc: Float[Tensor, "d_in d_sae"]) -> PreparedEncoder:
    """The encoder as it is."""
    return PreparedEncoder(W_enc)


def select(
    x: Float[Tensor, "rows d_in"], encoder: PreparedEncoder, bias: Float[Tensor, " d_sae"], rule: Rule
) -> tuple[Support, Float[Tensor, " nnz"]]:
    """The active features of each row under `rule`, and their pre-activations `x · W_enc + bias`."""
    pre = torch.addmm(bias, x, encoder.W_enc)
    match rule:
        case TopK(k):
            values, features = pre.topk(min(k, pre.shape[1]), dim=-1, sorted=False)
            active = torch.zeros_like(pre, dtype=torch.bool).scatter(-1, features, values > 0)
        case BatchTopK(k):
            values, entries = rule.rank(pre).flatten().topk(min(k * len(pre), pre.numel()), sorted=False)
            active = torch.zeros_like(pre, dtype=torch.bool).flatten().scatter(-1, entries, values > 0).view_as(pre)
        case Above(threshold):
            active = pre > threshold
    return Support.of(active), pre[active]


def dots(a: Float[Tensor, "rows d"], b: Float[Tensor, "d_sae d"], support: Support) -> Float[Tensor, " nnz"]:
    """`a[row] · b[feature]` for each entry."""
    return (a[support.rows] * b[support.features.long()]).sum(-1)


def combine(values: Float[Tensor, " nnz"], support: Support, b: Float[Tensor, "d_sae d"]) -> Float[Tensor, "rows d"]:
    """`Σ values · b[feature]` over each row's entries."""
    out = b.new_zeros((support.n_rows, b.shape[1]))
    return out.index_add(0, support.rows, values[:, None] * b[support.features.long()])


def add_by_feature_(
    out: Float[Tensor, "d_sae d"], values: Float[Tensor, " nnz"], support: Support, a: Float[Tensor, "rows d"]
) -> None:
    """`out[feature] += Σ values · a[row]` over each feature's entries."""
    out.index_add_(0, support.features.long(), values[:, None] * a[support.rows])


def sum_by_feature(values: Float[Tensor, " nnz"], support: Support) -> Float[Tensor, " d_sae"]:
    """`Σ values` over each feature's entries."""
    return values.new_zeros(support.d_sae).index_add(0, support.features.long(), values)


def adam_(
    parameter: Float[Tensor, "n d"],
    gradient: Float[Tensor, "n d"],
    exp_avg: Float[Tensor, "n d"],
    exp_avg_sq: Float[Tensor, "n d"],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """One step of Adam. `unit_rows` first removes the gradient's component along each row, and rescales the row to unit
    norm after the step.

    Source: Kingma and Ba 2015; Bricken et al. 2023, appendix (the projection is a "small but real" gain).
    """
    if unit_rows:
        gradient = gradient - (gradient * parameter).sum(-1, keepdim=True) * parameter
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    parameter.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if unit_rows:
        parameter.div_(parameter.norm(dim=-1, keepdim=True).clamp_min(1e-12))
