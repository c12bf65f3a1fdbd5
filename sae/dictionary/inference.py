"""A dictionary on a device, asked and answering on the CPU: what evaluation and index read rows through."""

from __future__ import annotations

from copy import deepcopy

from jaxtyping import Float
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.kernels import choose, device_named
from sae.kernels.activations import SparseActs


class Placed:
    """Encodes and decodes where it was told to; whoever counts gets sparse activations and x̂ on the CPU.

    Raises: ValueError for a device there is not, or kernels that do not run on it.
    """

    def __init__(self, sae: SAE, device: str = "auto", kernels: str = "auto") -> None:
        self.device = device_named(device)
        self.kernels = choose(kernels, self.device)
        self._sae = sae if self.device.type == "cpu" else deepcopy(sae).to(self.device)

    def encode(self, x: Float[Tensor, "rows d_in"]) -> SparseActs:
        """Feature activations."""
        return self._encode(x.to(self.device)).to("cpu")

    def reconstruct(self, x: Float[Tensor, "rows d_in"]) -> tuple[SparseActs, Float[Tensor, "rows d_out"]]:
        """Feature activations, and x̂."""
        x = x.to(self.device)
        acts = self._encode(x)
        return acts.to("cpu"), self._sae.output(acts, x).cpu()

    def _encode(self, x: Tensor) -> SparseActs:
        return self._sae.feature_acts(x, self.kernels).sparse()
