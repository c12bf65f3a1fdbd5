"""The operations of a step on one shard of the features: which entries are active is decided by all shards."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels import reference
from sae.kernels.autograd import Kernels
from sae.kernels.sparsity import Above, BatchTopK, NotSparse, PreparedEncoder, Rule, Support, TopK
from sae.parallel.mesh import Mesh
from sae.parallel.selection import largest_of_batch, largest_of_rows


def agreeing(kernels: Kernels, mesh: Mesh) -> Kernels:
    """These kernels for one shard of a dictionary: `select` gives its entries among the largest of all shards."""
    return kernels if mesh.world == 1 else cast(Kernels, AgreeingKernels(kernels, mesh))


class AgreeingKernels:
    """A backend whose `select` agrees over the ranks; the rest is the backend's own."""

    def __init__(self, inner: Kernels, mesh: Mesh) -> None:
        self.inner, self.mesh, self.NAME = inner, mesh, inner.NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def select(
        self, x: Float[Tensor, "rows d_in"], encoder: PreparedEncoder, bias: Float[Tensor, " d_shard"], rule: Rule
    ) -> tuple[Support, Float[Tensor, " nnz"]]:
        """The active features of this shard and their pre-activations, as one process would select them.

        Raises: NotSparse for `Above` alone, where no exchange follows: this shard then takes the dense path, and the
        others need not.
        """
        if isinstance(rule, Above):
            return self.inner.select(x, encoder, bias, rule)
        support, pre = self._own(x, encoder, bias, rule)
        if isinstance(rule, TopK):
            kept = largest_of_rows(self.mesh, support, pre, rule.k)
        else:
            ranks = pre + rule.lifts(bias)[support.features.long()]
            kept = largest_of_batch(self.mesh, ranks, rule.k * len(x) * self.mesh.row_groups)
        return support.where(kept), pre[kept]

    def _own(self, x: Tensor, encoder: PreparedEncoder, bias: Tensor, rule: TopK | BatchTopK) -> tuple[Support, Tensor]:
        """This shard's candidates: as many as it may have of what all shards keep."""
        if isinstance(rule, TopK):
            mine: Rule = TopK(min(rule.k, len(bias)))
        else:  # one row group may hold more than its share of the batch
            mine = BatchTopK(min(rule.k * self.mesh.row_groups, len(bias)), rule.lift)
        if not len(bias):  # no dead feature in this shard, where only dead ones are selected from
            return Support.of(x.new_zeros((len(x), 0), dtype=torch.bool)), x.new_empty(0)
        try:
            return self.inner.select(x, encoder, bias, mine)
        except NotSparse:  # the other shards wait for this one's candidates
            return reference.select(x, reference.prepare(encoder.W_enc), bias, mine)
