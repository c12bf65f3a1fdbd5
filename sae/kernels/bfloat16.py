"""Selection as under bfloat16 autocast: features are chosen straight from a bfloat16 product, which also gives values.

Both factors and the bias are rounded to bfloat16, sums are float32, and the result is rounded to bfloat16: 8 bits, so
that many values tie. Everything after the values is float32, as with float32 selection.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels.autograd import Kernels
from sae.kernels.sparsity import Above, BatchTopK, PreparedEncoder, Rule, Support, TopK

PRECISIONS = ("float32", "bf16")


def selecting_in(precision: str, kernels: Kernels) -> Kernels:
    """These kernels, with which features are selected in this precision."""
    return kernels if precision == "float32" else cast(Kernels, RoundedKernels(kernels))


class RoundedKernels:
    """A backend whose `select` takes a bfloat16 product for the pre-activations; the rest is the backend's own."""

    def __init__(self, inner: Kernels) -> None:
        self.inner, self.NAME = inner, inner.NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def prepare(self, W_enc: Float[Tensor, "d_in d_sae"]) -> PreparedEncoder:
        """The encoder as it is."""
        return PreparedEncoder(W_enc)

    def select(
        self, x: Float[Tensor, "rows d_in"], encoder: PreparedEncoder, bias: Float[Tensor, " d_sae"], rule: Rule
    ) -> tuple[Support, Float[Tensor, " nnz"]]:
        """The active features of each row under `rule`, and their pre-activations. Of equal values the first count."""
        pre = torch.addmm(bias.bfloat16(), x.bfloat16(), encoder.W_enc.bfloat16())
        match rule:
            case TopK(k):
                active = largest(pre, k)
            case BatchTopK(k):
                active = largest(rule.rank(pre.float()).view(1, -1), k * len(pre)).view_as(pre)
            case Above(threshold):
                active = pre > threshold
        return Support.of(active), pre[active].float()


def largest(values: Float[Tensor, "rows n"], k: int) -> Bool[Tensor, "rows n"]:
    """Where the k largest positive values of each row are; of equal ones the first."""
    bar = values.topk(min(k, values.shape[1])).values[:, -1:].clamp_min(0)
    above = values > bar
    tied = (values == bar) & (bar > 0)
    left = k - above.sum(-1, keepdim=True)
    crowded = tied.sum(-1) > left.squeeze(-1)
    if crowded.any():
        tied[crowded] &= tied[crowded].cumsum(-1) <= left[crowded]
    return above | tied
