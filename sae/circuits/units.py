"""Three ways to cut what attention writes into units: features of a dictionary, principal components, head dimensions.

Every unit has non-negative activations and one direction, so that the same questions can be asked of all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.circuits.sites import Site
from sae.dictionary.autoencoder import SAE, refuse_row_scale, refuse_transcoder
from sae.lm import LanguageModel, layer_of


@dataclass(frozen=True, eq=False)
class Units:
    """`acts(x) ≥ 0` of each unit at `hook_point`; `directions` are there, `written` in the residual stream."""

    name: str
    hook_point: str
    acts: Callable[[Float[Tensor, "*batch d_in"]], Float[Tensor, "*batch unit"]]
    directions: Float[Tensor, "unit d_in"]
    written: Float[Tensor, "unit d_model"]

    def __len__(self) -> int:
        return len(self.directions)


@dataclass(frozen=True, eq=False)
class UnitsByPrompt(Site):
    """Of each prompt the units in `chosen`: patching moves what these write, together."""

    units: Units | None = None
    chosen: Bool[Tensor, "prompt unit"] | None = None

    def change(
        self, x: Float[Tensor, "prompt pos d_in"], source: Float[Tensor, "prompt pos d_in"]
    ) -> Float[Tensor, "prompt pos d_in"]:
        """`Σ over chosen units of (a_source − a) · direction`."""
        assert self.units is not None
        assert self.chosen is not None
        moved = (self.units.acts(source) - self.units.acts(x)) * self.chosen[:, None].to(x)
        found: Tensor = moved @ self.units.directions.to(x)
        return found


def features(sae: SAE, hook_point: str) -> Units:
    """The features of a dictionary of a block's `hook_attn_out`. Raises: ValueError for one that normalises rows."""
    refuse_transcoder(sae, "units")
    refuse_row_scale(sae, "units")
    return Units("features", hook_point, sae.encode, sae.W_dec, sae.W_dec)


def components(rows: Float[Tensor, "row d_model"], hook_point: str) -> Units:
    """Principal components of the rows, each as two units: what is above and below the mean along it."""
    mean = rows.mean(0)
    _, axes = torch.linalg.eigh((rows - mean).T.double() @ (rows - mean).double())
    return _two_sided("components", hook_point, mean, axes.T.to(rows), axes.T.to(rows))


def head_dimensions(model: LanguageModel, rows: Float[Tensor, "row width"], hook_point: str) -> Units:
    """The entries of the heads' outputs `attn.hook_z`, each as two units: above and below its mean in `rows`."""
    W_O = model.weights().layers[layer_of(hook_point)].attn.W_O.flatten(0, 1)
    return _two_sided("head dimensions", hook_point, rows.mean(0), torch.eye(len(W_O)).to(rows), W_O)


def _two_sided(
    name: str,
    hook_point: str,
    mean: Float[Tensor, " d_in"],
    axes: Float[Tensor, "axis d_in"],
    written: Float[Tensor, "axis d_model"],
) -> Units:
    both, out = torch.cat([axes, -axes]), torch.cat([written, -written])
    return Units(name, hook_point, lambda x: ((x - mean.to(x)) @ both.to(x).T).clamp_min(0), both, out)
