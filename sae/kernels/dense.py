"""The dense path, for the first steps of a dictionary that learns its sparsity: plain torch, hand-written backward.

Rows are processed in blocks that stay in the cache between a product and the operations on it; matrices as large as the
activations use pooled memory; weight gradients are added in place. Almost all of the time goes to the five products.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import buffers
from sae.kernels.matmul import add_product_, factor, product

ROWS = 512  # in a block, on a CPU


def relu(
    x: Float[Tensor, "rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
) -> tuple[Float[Tensor, "rows d_sae"], Float[Tensor, " d_sae"], Int[Tensor, ""]]:
    """`f = ReLU((x − b_dec) W_enc + b_enc)`, its sums over the rows, and (without a gradient) how many are positive."""
    found: tuple[Tensor, Tensor, Tensor] = _ReLU.apply(x, W_enc, b_enc, b_dec)  # type: ignore[no-untyped-call]
    return found


def decode(values: Float[Tensor, "rows d_sae"], W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "rows d_out"]:
    """`values W_dec`."""
    out: Tensor = _Decode.apply(values, W_dec)  # type: ignore[no-untyped-call]
    return out


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred, W = x - b_dec, factor(W_enc)
        f = buffers.empty(len(x), len(b_enc), like=x)
        positive = buffers.empty(_at_once(x), len(b_enc), like=x)
        sums, active = torch.zeros_like(b_enc), torch.zeros((), dtype=torch.int64, device=x.device)
        for rows in _blocks(x):
            f_rows = product(f[rows], centred[rows], W).add_(b_enc).relu_()
            sums += f_rows.sum(0)
            # float32 counts the entries of a row exactly, of all rows not
            active += torch.gt(f_rows, 0, out=positive[: len(f_rows)]).sum(-1).long().sum()
        ctx.weight = W_enc
        ctx.save_for_backward(centred, f, W_enc)
        ctx.mark_non_differentiable(active)
        ctx.set_materialize_grads(False)
        return f, sums, active

    @staticmethod
    def backward(ctx: Any, d_f: Tensor | None, d_sums: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        centred, f, W_enc = ctx.saved_tensors
        d_pre = buffers.empty(_at_once(f), f.shape[1], like=f)
        d_W, returned = _accumulator(ctx.weight, ctx.needs_input_grad[1])
        d_bias = f.new_zeros(f.shape[1])
        d_x = torch.empty_like(centred) if ctx.needs_input_grad[0] else None
        for rows in _blocks(f):
            block = d_pre[: len(f[rows])]
            of_f = d_f[rows] if d_f is not None else block.zero_()
            torch.add(of_f, d_sums if d_sums is not None else 0.0, out=block)
            torch.ops.aten.threshold_backward.grad_input(block, f[rows], 0.0, grad_input=block)
            d_bias += block.sum(0)
            narrow = factor(block)
            if d_W is not None:
                add_product_(d_W.t(), narrow.t(), centred[rows])
            if d_x is not None:
                product(d_x[rows], narrow, W_enc.t())
        return d_x, returned, d_bias, -(W_enc @ d_bias)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor) -> Tensor:
        ctx.weight = W_dec
        ctx.save_for_backward(values, W_dec)
        out, W = values.new_empty((len(values), W_dec.shape[1])), factor(W_dec)
        for rows in _blocks(values):
            product(out[rows], values[rows], W)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        d_values = buffers.empty(*values.shape, like=values) if ctx.needs_input_grad[0] else None
        d_W, returned = _accumulator(ctx.weight, ctx.needs_input_grad[1])
        W = factor(W_dec).t()
        for rows in _blocks(values):
            d_rows = factor(d_out[rows])
            if d_values is not None:
                product(d_values[rows], d_rows, W)
            if d_W is not None:
                add_product_(d_W, values[rows].t(), d_rows)
        return d_values, returned


def _at_once(matrix: Tensor) -> int:
    return min(len(matrix), ROWS) if matrix.device.type == "cpu" else len(matrix)


def _blocks(matrix: Tensor) -> list[slice]:
    """The rows, by blocks."""
    step = max(1, _at_once(matrix))
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def _accumulator(weight: Tensor, needed: bool) -> tuple[Tensor | None, Tensor | None]:
    """The tensor in which a weight's gradient is summed, and what backward returns: None if that is `weight.grad`."""
    if not needed:
        return None, None
    if weight.is_leaf and weight.grad is not None:
        return weight.grad, None
    zeros = torch.zeros_like(weight)
    return zeros, zeros
