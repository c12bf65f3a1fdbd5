"""The sites of a crosscoder: where the parts of its rows come from, and what its decoder says of each feature there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.autoencoder import SAE, rescaled


class Site(NamedTuple):
    """A part of a crosscoder's rows: `width` values, which training multiplies by `scale` so that all sites count."""

    name: str
    width: int
    scale: float


def sites_of(sae: SAE) -> list[Site]:
    """The sites of a crosscoder, in the order of its values, as its config.json records them; else an empty list."""
    return [Site(str(site["name"]), int(site["width"]), float(site["scale"])) for site in sae.config.get("sites", [])]


@torch.no_grad()
def fold_site_scales(sae: SAE, sites: Sequence[Site]) -> SAE:
    """The dictionary that does on raw rows what `sae` does on rows whose sites are multiplied by their scales.

    `W_enc[site] · s`, `W_dec[:, site] / s` and `b_dec[site] / s`; activations stay.
    """
    scales = torch.cat([torch.full((site.width,), site.scale, dtype=torch.float64) for site in sites])
    return rescaled(sae, {"W_enc": scales[:, None], "W_dec": 1 / scales, "b_dec": 1 / scales})


def site_decoders(sae: SAE, sites: Sequence[Site]) -> list[Float[Tensor, "d_sae _"]]:
    """`s W_dec^s` of each site, float64: decoder rows in units where all sites have the same mean squared norm."""
    parts = torch.split(sae.W_dec.detach().double(), [site.width for site in sites], dim=-1)
    return [part * site.scale for part, site in zip(parts, sites, strict=True)]


def norm_shares(decoders: Sequence[Float[Tensor, "d_sae _"]]) -> Float[Tensor, "d_sae n_sites"]:
    """`‖W_dec,i^s‖ / Σ_t ‖W_dec,i^t‖`, the share of each site in a feature's decoder norms; NaN where all are 0.

    Of two sites, the second column is the relative decoder norm of Lindsey et al. 2024 ("Model diffing"): near 0 a
    feature belongs to the first site only, near ½ to both, near 1 to the second only.
    """
    norms = torch.stack([decoder.norm(dim=-1) for decoder in decoders], dim=-1)
    return norms / norms.sum(-1, keepdim=True)


def site_cosines(decoders: Sequence[Float[Tensor, "d_sae _"]]) -> dict[tuple[int, int], Float[Tensor, " d_sae"]]:
    """The cosine of each feature's decoder rows at two sites, for each pair of sites of one width.

    NaN where a row is 0. Source: Lindsey et al. 2024, "Model diffing".
    """
    units = [decoder / decoder.norm(dim=-1, keepdim=True) for decoder in decoders]
    pairs = [(a, b) for a in range(len(units)) for b in range(a + 1, len(units))]
    return {(a, b): (units[a] * units[b]).sum(-1) for a, b in pairs if units[a].shape == units[b].shape}


def refuse_crosscoder(sae: SAE, verb: str, error: type[Exception] = ValueError) -> None:
    """Raises `error` for a crosscoder: `verb` needs rows of one hook point of one model."""
    if sites := sites_of(sae):
        raise error(
            f"{verb}: this dictionary is a crosscoder: its rows join {len(sites)} sites "
            f"({', '.join(site.name for site in sites)}), and here rows of one hook point are needed. Crosscoders work "
            "with training, evaluation, info and native export."
        )
