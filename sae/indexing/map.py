"""Where each feature lies on the map: decoder directions in two dimensions, and in clusters.

The only door to umap (the optional extra `map`); without it the map has its principal components.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

UMAP_NEIGHBOURS = 15
KMEANS_STEPS = 25


def panels(W_dec: Float[Tensor, "d_sae d_in"], *, seed: int = 0) -> dict[str, np.ndarray]:
    """`map/pca`, `map/cluster`, and `map/umap` where umap-learn is installed and there are features enough."""
    unit = torch.nn.functional.normalize(W_dec.detach(), dim=-1)
    found = {"map/pca": pca(unit).float().numpy(), "map/cluster": clusters(unit, seed=seed).int().numpy()}
    if len(unit) > UMAP_NEIGHBOURS and find_spec("umap"):
        found["map/umap"] = umap(unit, seed=seed)
    return found


def pca(unit: Float[Tensor, "n d"]) -> Float[Tensor, "n 2"]:
    """Coordinates on the two directions of largest variance; each direction's largest loading is positive."""
    centred = unit.double() - unit.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -2:].flip(-1)
    loadings = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    found = centred @ (axes * loadings.sign())
    return torch.nn.functional.pad(found, (0, 2 - found.shape[1]))


def umap(unit: Float[Tensor, "n d"], *, seed: int) -> Float[np.ndarray, "n 2"]:
    """UMAP of the directions by cosine (McInnes et al. 2018); the same seed gives the same map."""
    from umap import UMAP

    return UMAP(n_neighbors=UMAP_NEIGHBOURS, metric="cosine", random_state=seed, n_jobs=1).fit_transform(unit.numpy())


def n_clusters(n: int) -> int:
    """√n / 2, so that names stay readable on a map: 32 of 4,096 features, 64 of 16,384."""
    return max(1, min(96, round(n**0.5 / 2)))


def clusters(unit: Float[Tensor, "n d"], *, seed: int) -> Int[Tensor, " n"]:
    """Spherical k-means: each direction with the centre nearest by cosine, k-means++ starts; 0 is the largest."""
    generator = torch.Generator().manual_seed(seed)
    centres = unit[torch.randint(len(unit), (1,), generator=generator)]
    far = 1 - unit @ centres[0]
    for _ in range(1, n_clusters(len(unit))):
        weights = far.clamp_min(0) + 1e-9
        chosen = unit[torch.multinomial(weights, 1, generator=generator)]
        centres = torch.cat([centres, chosen])
        far = torch.minimum(far, 1 - unit @ chosen[0])
    for _ in range(KMEANS_STEPS):
        member = (unit @ centres.T).argmax(-1)
        centres = torch.nn.functional.normalize(torch.zeros_like(centres).index_add_(0, member, unit), dim=-1)
    member = (unit @ centres.T).argmax(-1)
    order = torch.bincount(member, minlength=len(centres)).argsort(descending=True, stable=True)
    return order.argsort()[member]
