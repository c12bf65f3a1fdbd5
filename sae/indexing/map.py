"""The map of features: decoder directions projected to two dimensions and grouped into clusters.

The only module that imports umap (optional extra `map`). Without umap the map shows principal components.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from sae.dictionary.directions import spread_rows, unit
from sae.kernels.compiler_cache import choose_cache_directory

UMAP_NEIGHBOURS = 15
KMEANS_STEPS = 25
MAX_CLUSTERS = 96


def panels(W_dec: Float[Tensor, "d_sae d_in"], *, seed: int = 0) -> dict[str, np.ndarray]:
    """`map/pca` and `map/cluster`; also `map/umap` where umap-learn is installed and there are enough features."""
    directions = unit(W_dec.detach())
    found = {"map/pca": pca(directions).float().numpy(), "map/cluster": clusters(directions, seed=seed).int().numpy()}
    if len(directions) > UMAP_NEIGHBOURS and find_spec("umap"):
        found["map/umap"] = umap(directions, seed=seed)
    return found


def pca(directions: Float[Tensor, "n d"]) -> Float64[Tensor, "n 2"]:
    """Coordinates on the two principal axes; the sign of each axis makes its largest loading positive."""
    centred = directions.double() - directions.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -2:].flip(-1)
    loadings = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    coordinates = centred @ (axes * loadings.sign())
    return torch.nn.functional.pad(coordinates, (0, 2 - coordinates.shape[1]))


def umap(directions: Float[Tensor, "n d"], *, seed: int) -> Float32[np.ndarray, "n 2"]:
    """UMAP with the cosine metric; the same seed gives the same map.

    Source: McInnes et al. 2018.
    """
    choose_cache_directory()  # umap's loops are compiled by numba
    from umap import UMAP

    layout = UMAP(n_neighbors=UMAP_NEIGHBOURS, metric="cosine", random_state=seed, n_jobs=1)
    return np.asarray(layout.fit_transform(directions.numpy()))


def n_clusters(n: int) -> int:
    """√n / 2 clusters, so that their names stay readable on the map: 32 for 4,096 features, 64 for 16,384."""
    return max(1, min(MAX_CLUSTERS, round(math.sqrt(n) / 2)))


def clusters(directions: Float[Tensor, "n d"], *, seed: int) -> Int[Tensor, " n"]:
    """The cluster of each unit direction by spherical k-means with k-means++ seeding; cluster 0 is the largest."""
    generator = torch.Generator().manual_seed(seed)
    centres = directions[spread_rows(directions, n_clusters(len(directions)), generator)]
    if not len(centres):  # every direction is zero
        return torch.zeros(len(directions), dtype=torch.int64)
    for _ in range(KMEANS_STEPS):
        member = (directions @ centres.T).argmax(-1)
        centres = unit(torch.zeros_like(centres).index_add_(0, member, directions))
    member = (directions @ centres.T).argmax(-1)
    by_size = torch.bincount(member, minlength=len(centres)).argsort(descending=True, stable=True)
    return by_size.argsort()[member]
