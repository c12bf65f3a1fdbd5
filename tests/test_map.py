"""The map's coordinates and clusters against planted directions and the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from sae.indexing.map import clusters, n_clusters, panels, pca


def blobs(per_blob: int, n_blobs: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    centres = torch.linalg.qr(torch.randn(24, n_blobs, generator=generator))[0].T
    of = torch.arange(n_blobs).repeat_interleave(per_blob)
    noise = torch.randn(len(of), 24, generator=generator)
    return torch.nn.functional.normalize(centres[of] + spread * noise, dim=-1), of


def test_pca_is_the_singular_value_decomposition() -> None:
    unit, _ = blobs(30, 3, 0.2)
    found = pca(unit)
    u, s, _ = torch.linalg.svd((unit - unit.mean(0)).double(), full_matrices=False)
    expected = u[:, :2] * s[:2]
    signs = (found * expected).sum(0).sign()
    torch.testing.assert_close(found, expected * signs, atol=1e-6, rtol=1e-5)
    assert torch.equal(pca(unit), found)


def test_clusters_are_the_planted_ones() -> None:
    """More clusters than were planted are requested: no cluster may mix two planted ones."""
    unit, of = blobs(40, 5, 0.05)
    found = clusters(unit, seed=0)
    assert len(set(found.tolist())) <= n_clusters(200)
    for cluster in set(found.tolist()):
        assert len(set(of[found == cluster].tolist())) == 1
    sizes = torch.bincount(found)
    assert torch.equal(sizes, sizes.sort(descending=True).values)
    assert torch.equal(clusters(unit, seed=0), found)


@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (5, 1)])
def test_few_features_and_dead_features_have_coordinates(n: int, d: int) -> None:
    W_dec = torch.randn(n, d)
    W_dec[0] = 0
    found = panels(W_dec)
    assert found["map/pca"].shape == (n, 2)
    assert found["map/cluster"].shape == (n,)
    assert "map/umap" not in found


@pytest.mark.slow
def test_umap_keeps_the_blobs_apart() -> None:
    pytest.importorskip("umap")
    unit, of = blobs(30, 4, 0.05)
    found = torch.from_numpy(panels(unit)["map/umap"])
    centres = torch.stack([found[of == i].mean(0) for i in range(4)])
    within = max(float((found[of == i] - centres[i]).norm(dim=-1).mean()) for i in range(4))
    between = float(torch.cdist(centres, centres)[~torch.eye(4, dtype=torch.bool)].min())
    assert between > 2 * within
