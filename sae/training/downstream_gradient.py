"""The loss of end-to-end training for a step in fixed shapes: the model's part of it, which PyTorch computes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.training.objectives import KL_ROWS, divergence
from sae.training.rows import Downstream


def kl_gradient_(
    x: Float[Tensor, "rows d_in"],
    x_hat: Float[Tensor, "rows d_in"],
    resid: Float[Tensor, "rows d_model"],
    downstream: Downstream,
    scale: float,
    gradient: Float[Tensor, "rows d_in"],
    row_losses: Float[Tensor, " rows"],
) -> None:
    """Writes the gradient of `mean KL(p(x) ‖ p(x̂))` with respect to x̂, and losses of the rows with that mean.

    x and x̂ are in scaled units. Each chunk of rows is done forward and backward before the next one, so that only one
    chunk's logits are in memory at a time, and nothing is computed twice. Each of its rows gets the chunk's mean loss.
    """
    parts = (torch.split(tensor, KL_ROWS) for tensor in (x, x_hat, resid, gradient, row_losses))
    for x_part, x_hat_part, resid_part, gradient_part, losses_part in zip(*parts, strict=True):
        leaf = x_hat_part.detach().requires_grad_()
        with torch.enable_grad():
            kl = divergence(x_part, leaf, resid_part, downstream, scale)
        (d_x_hat,) = torch.autograd.grad(kl, leaf)
        torch.mul(d_x_hat, 1 / len(x), out=gradient_part)
        losses_part.copy_(kl.detach() / len(x_part))
