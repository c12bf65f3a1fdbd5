"""The loss of pretraining: cross-entropy and its gradients without all logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny  # a probability below it counts as this: a loss of 87 nats


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `h @ W.T`, computed in chunks of rows: allocating all logits costs more than the products.

    Logits are bfloat16 products, their softmax is float32; the forward pass computes the gradients, chunk by chunk.
    """

    CHUNK_ROWS = 512

    @staticmethod
    def forward(
        ctx: Any, h: Float[Tensor, "rows d_model"], W: Float[Tensor, "d_vocab d_model"], target: Int[Tensor, " rows"]
    ) -> Float[Tensor, ""]:
        rows, size = h.shape[0], min(h.shape[0], ChunkedCrossEntropy.CHUNK_ROWS)
        h_half, W_half = h.bfloat16(), W.bfloat16()
        grad_h, grad_W = torch.empty_like(h_half), torch.zeros_like(W)
        half, wide = h_half.new_empty(size, len(W)), W.new_empty(size, len(W))  # reused by every chunk
        loss = torch.zeros((), dtype=torch.float64)
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            wanted = target[chunk, None]
            logits, p = half[: len(wanted)], wide[: len(wanted)]
            torch.mm(h_half[chunk], W_half.T, out=logits)
            torch.softmax(p.copy_(logits), -1, out=p)
            loss -= p.gather(1, wanted).clamp_min(SMALLEST).log().sum(dtype=torch.float64)
            p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0))
            logits.copy_(p)
            torch.mm(logits, W_half, out=grad_h[chunk])
            grad_W += logits.T @ h_half[chunk]
        ctx.save_for_backward(grad_h, grad_W)
        ctx.rows = rows
        return (loss / rows).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_h, grad_W = ctx.saved_tensors
        scale = grad / ctx.rows
        return grad_h.float() * scale, grad_W * scale, None
