"""Linear paths from a hook point to the logits: what a direction there adds to the residual stream, and its readout.

The direct path of x at a hook point is what reaches the final norm when everything that later blocks compute is held at
its value. It is linear in x once the scale σ of the norms that it passes is held, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class NoLinearPath(ValueError):
    """A hook point from which no linear map leads to the logits; the message says why."""

    def __init__(self, hook_point: str, reason: str) -> None:
        super().__init__(f"{hook_point} has no linear path to the logits: {reason}.")


@dataclass(frozen=True)
class Norm:
    """`(x − mean x) / σ(x) · weight` plus a constant; RMSNorm, which is not `centred`, keeps the mean."""

    weight: Float[Tensor, " d_model"]
    centred: bool
    eps: float

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """σ(x) = √(mean square + ε), of x − mean x if `centred`."""
        x = self._centre(x)
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def numerator(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """`(x − mean x) · weight`: the norm times σ, linear in x, without the norm's constant."""
        return self._centre(x) * self.weight.to(x)

    def transposed(self, push: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transpose of `numerator`: a gradient after the norm, as one before it, times σ."""
        return self._centre(push * self.weight.to(push))

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True)
class DirectPath:
    """What x at a hook point adds to the residual stream: `factor · norm(x @ matrix)`.

    `matrix` None is the identity, `norm` None no norm. `norm_input` is the hook point of what the norm reads.
    `alone`: nothing but the final norm reads what x adds, so that the direct path is the only one.
    """

    matrix: Float[Tensor, "d_in d_model"] | None = None
    norm: Norm | None = None
    norm_input: str | None = None
    factor: float = 1.0
    alone: bool = False

    def linear(self, directions: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_model"]:
        """What directions add to the residual stream; times σ of the norm on the path, if there is one."""
        out = directions if self.matrix is None else directions @ self.matrix.to(directions)
        out = out if self.norm is None else self.norm.numerator(out)
        return out if self.factor == 1.0 else out * self.factor

    def transposed(self, push: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_in"]:
        """The transpose of `linear`: a gradient at the residual stream, as one at the hook point."""
        push = push * self.factor
        push = push if self.norm is None else self.norm.transposed(push)
        return push if self.matrix is None else push @ self.matrix.T.to(push)


@dataclass(frozen=True)
class Readout:
    """Logits from the residual stream: `factor · norm(resid) @ W_U` plus a constant, then the soft cap if there is one.

    A soft cap c turns z into c · tanh(z / c); paths and logit weights are those of the logits z before it.
    """

    norm: Norm
    W_U: Float[Tensor, "d_model d_vocab"]
    factor: float = 1.0
    soft_cap: float | None = None

    def uncapped(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
        """The logits before the soft cap."""
        if self.soft_cap is None:
            return logits
        return torch.atanh(logits / self.soft_cap) * self.soft_cap
