"""The two differentiable operations on active features, `encode` and `decode`, for any backend.

A dictionary is `values = act(dots(x − b_dec, W_enc) + b_enc)` on a support and `x̂ = combine(values, W_dec) + b_dec`.
The support is selected without a gradient. Given the support both gradients are exact, and everything between `encode`
and `decode` is elementwise on [nnz].
A weight that already has a `.grad` gets its gradient added there in place: allocating a dense [d_sae, d_in] gradient at
every step would cost more than the arithmetic.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.sparsity import PreparedEncoder, Rule, Support


class Kernels(Protocol):
    """The functions of a backend module; `sae.kernels.reference` documents each of them."""

    NAME: str

    def describe(self) -> str: ...

    def prepare(self, W_enc: Tensor) -> PreparedEncoder: ...

    def select(self, x: Tensor, encoder: PreparedEncoder, bias: Tensor, rule: Rule) -> tuple[Support, Tensor]: ...

    def dots(self, a: Tensor, b: Tensor, support: Support) -> Tensor: ...

    def combine(self, values: Tensor, support: Support, b: Tensor) -> Tensor: ...

    def add_by_feature_(self, out: Tensor, values: Tensor, support: Support, a: Tensor) -> None: ...

    def sum_by_feature(self, values: Tensor, support: Support) -> Tensor: ...

    def adam_(
        self,
        parameter: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        unit_rows: bool,
    ) -> None: ...


def encode(
    kernels: Kernels,
    x: Float[Tensor, "rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    rule: Rule,
    prepared: PreparedEncoder | None = None,
) -> tuple[Float[Tensor, " nnz"], Support]:
    """The pre-activations `(x − b_dec) · W_enc + b_enc` of the features that `rule` makes active.

    `prepared` is what `kernels.prepare(W_enc)` returned, if W_enc has not changed since.
    """
    with torch.no_grad():
        centred = x - b_dec
        support, pre = kernels.select(centred, prepared or kernels.prepare(W_enc), b_enc, rule)
    return _PreActs.apply(kernels, support, pre, centred, x, W_enc, b_enc, b_dec), support  # type: ignore[no-untyped-call]


def decode(
    kernels: Kernels, values: Float[Tensor, " nnz"], support: Support, W_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "rows d_in"]:
    """`Σ values · W_dec[feature]` for each row."""
    out: Tensor = _Combine.apply(kernels, support, values, W_dec)  # type: ignore[no-untyped-call]
    return out


class _PreActs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        support: Support,
        pre: Tensor,
        centred: Tensor,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
    ) -> Tensor:
        ctx.kernels, ctx.support, ctx.weight = kernels, support, W_enc
        ctx.save_for_backward(centred, W_enc)
        return pre.clone()

    @staticmethod
    def backward(ctx: Any, d_pre: Tensor) -> tuple[Tensor | None, ...]:
        kernels, support, needed = ctx.kernels, ctx.support, ctx.needs_input_grad
        centred, W_enc = ctx.saved_tensors
        d_x = kernels.combine(d_pre, support, W_enc.t()) if needed[4] else None
        d_W = _weight_gradient(ctx.weight, kernels, d_pre, support, centred, True) if needed[5] else None
        d_b_enc = kernels.sum_by_feature(d_pre, support) if needed[6] or needed[7] else None
        # −Σ over rows of what reaches x: by feature first, it costs one product with a vector.
        d_b_dec = -(W_enc @ d_b_enc) if needed[7] and d_b_enc is not None else None
        return None, None, None, None, d_x, d_W, d_b_enc, d_b_dec


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, support: Support, values: Tensor, W_dec: Tensor) -> Tensor:
        ctx.kernels, ctx.support, ctx.weight = kernels, support, W_dec
        ctx.save_for_backward(values, W_dec)
        return kernels.combine(values, support, W_dec)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        kernels, support, needed = ctx.kernels, ctx.support, ctx.needs_input_grad
        values, W_dec = ctx.saved_tensors
        d_values = kernels.dots(d_out, W_dec, support) if needed[2] else None
        d_W = _weight_gradient(ctx.weight, kernels, values, support, d_out, False) if needed[3] else None
        return None, None, d_values, d_W


def _weight_gradient(
    weight: Tensor, kernels: Kernels, values: Tensor, support: Support, a: Tensor, transposed: bool
) -> Tensor | None:
    """`Σ values · a[row]` by feature: added to `weight.grad` if that exists, else returned."""
    if weight.is_leaf and weight.grad is not None:
        kernels.add_by_feature_(weight.grad.t() if transposed else weight.grad, values, support, a)
        return None
    out = a.new_zeros((support.d_sae, a.shape[1]))
    kernels.add_by_feature_(out, values, support, a)
    return out.t() if transposed else out


class _TakeFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, features: Tensor, dim: int) -> Tensor:
        ctx.weight, ctx.features, ctx.dim = weight, features, dim
        return weight.index_select(dim, features)

    @staticmethod
    def backward(ctx: Any, d_taken: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.weight.is_leaf and ctx.weight.grad is not None:
            ctx.weight.grad.index_add_(ctx.dim, ctx.features, d_taken)
            return None, None, None
        return torch.zeros_like(ctx.weight).index_add_(ctx.dim, ctx.features, d_taken), None, None


def take_features(weight: Tensor, features: Int[Tensor, " n"], dim: int) -> Tensor:
    """`weight.index_select(dim, features)` for distinct features; the backward pass touches only those features."""
    taken: Tensor = _TakeFeatures.apply(weight, features, dim)  # type: ignore[no-untyped-call]
    return taken
