"""A frozen dictionary on a device, its inputs and results on the CPU; evaluation and index use it."""

from __future__ import annotations

from copy import deepcopy

from jaxtyping import Float
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.kernels import choose, device_named
from sae.kernels.activations import SparseActs, sparse_or_dense


class FrozenSAE:
    """Encodes and decodes many batches with one dictionary; its encoder is prepared for the kernels once.

    The dictionary must not change while this object is in use: on the CPU the weights are shared, and the prepared
    encoder would still hold the old ones.
    Raises: ValueError for a device that is not available, or kernels that do not run on it.
    """

    def __init__(self, sae: SAE, device: str = "auto", kernels: str = "auto") -> None:
        self.device = device_named(device)
        self.kernels = choose(kernels, self.device)
        self._sae = sae if self.device.type == "cpu" else deepcopy(sae).to(self.device)
        self._encoder = self.kernels.prepare(self._sae.W_enc)

    def encode(self, x: Float[Tensor, "rows d_in"]) -> SparseActs:
        """Feature activations, on the CPU."""
        return self._encode(x.to(self.device)).to("cpu")

    def reconstruct(self, x: Float[Tensor, "rows d_in"]) -> tuple[SparseActs, Float[Tensor, "rows d_out"]]:
        """Feature activations and x̂, on the CPU."""
        x = x.to(self.device)
        acts = self._encode(x)
        return acts.to("cpu"), self._sae.output(acts, x).cpu()

    def _encode(self, x: Tensor) -> SparseActs:
        sae = self._sae
        acts = sparse_or_dense(lambda: sae.encode_sparse(x, self.kernels, self._encoder), lambda: sae.encode_dense(x))
        return acts.sparse()
