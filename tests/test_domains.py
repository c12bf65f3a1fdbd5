"""Domain quality and decoder geometry against brute force and planted cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae.lab import domains
from sae.lab.domains import best_features, domain_quality
from sae.lab.geometry import A1_DENSITY, beside_a1, geometry, nearest_cosines


def made_up(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Firings [features, domains, halves] and tokens: feature 0 is domain 0, feature 1 half of domain 1, rest noise."""
    rng = np.random.default_rng(seed)
    tokens = np.array([[1000, 1200], [2000, 1800], [5000, 5000], [150, 900]])
    fired = rng.binomial(tokens, 0.02, size=(30, 4, 2))
    fired[0] = [[900, 1100], [10, 10], [20, 30], [0, 0]]
    fired[1] = [[0, 0], [1000, 900], [0, 0], [0, 0]]
    return fired, tokens


def test_the_best_features_are_found_and_judged_on_the_other_half() -> None:
    fired, tokens = made_up()
    table = best_features(fired, tokens)
    assert table[0]["features"] == [0, 0]
    precision, recall = 2000 / (2000 + 20 + 50), 2000 / 2200
    assert table[0]["precision"] == pytest.approx(precision)
    assert table[0]["recall"] == pytest.approx(recall)
    assert table[0]["f1"] == pytest.approx(2 / (1 / precision + 1 / recall))
    assert table[1]["f1"] == pytest.approx(2 / (1 + 3800 / 1900))
    assert table[3] is None  # too few tokens in one half


def test_choosing_on_one_half_does_not_reward_luck() -> None:
    """Features that fire at random in one half each: chosen there, they are judged by chance in the other."""
    fired = np.zeros((2, 2, 2), np.int64)
    fired[0, 0, 0], fired[0, 1, 1] = 500, 500
    fired[1, 1, 0], fired[1, 0, 1] = 500, 500
    assert best_features(fired, np.full((2, 2), 500))[0]["f1"] == 0


def test_pure_features() -> None:
    fired, tokens = made_up()
    quality = domain_quality(fired, tokens, ["a", "b", "c", "d"])
    by_domain = fired.sum(2)
    pure = [
        f
        for f in range(30)
        if by_domain[f].sum() >= domains.MIN_FIRINGS and by_domain[f].max() > 0.8 * by_domain[f].sum()
    ]  # noqa: E501
    assert {0, 1} <= set(pure)
    assert quality["pure_features"] == len(pure)
    assert quality["pure_by_domain"]["b"] >= 1
    assert sum(quality["pure_by_domain"].values()) == len(pure)
    assert quality["mean_f1"] == pytest.approx(np.mean([quality["best_feature"][d]["f1"] for d in "abc"]))
    assert quality["best_feature"]["d"] is None


def test_no_domain_and_no_firing_are_no_error() -> None:
    assert domain_quality(np.zeros((5, 0, 2), int), np.zeros((0, 2), int), [])["mean_f1"] is None
    quality = domain_quality(np.zeros((5, 2, 2), int), np.full((2, 2), 300), ["a", "b"])
    assert quality["pure_features"] == 0
    assert quality["mean_f1"] == 0


def test_nearest_cosines_against_brute_force() -> None:
    W = torch.randn(700, 9, generator=torch.Generator().manual_seed(0))
    cosines = torch.nn.functional.cosine_similarity(W[:, None], W[None], dim=-1).fill_diagonal_(-2)
    np.testing.assert_allclose(nearest_cosines(W), cosines.amax(-1), atol=1e-6)
    some = nearest_cosines(W, queries=10)
    assert len(some) == 10
    assert some[0] == pytest.approx(cosines[0].max().item(), abs=1e-6)
    assert len(nearest_cosines(W[:1])) == 0


def test_a_neuron_basis_is_all_on_one_neuron() -> None:
    found = geometry(torch.eye(8) * 3, np.ones(8, bool))
    assert found["top_neuron"]["p5"] == 1
    assert found["nearest_cosine"]["p95"] == 0
    assert geometry(torch.eye(8), np.zeros(8, bool))["top_neuron"]["median"] is None


def test_statistics_beside_the_papers() -> None:
    count = np.array([0, 10, 100, 1000, 2000])
    found = beside_a1(count, 100_000, np.array([0, 1, 2, 3, 5.0]), torch.eye(5), 0.9)
    values = {name: entry["value"] for name, entry in found["statistics"].items()}
    assert values == pytest.approx(
        {"l0": 0.0311, "median_density": 0.0055, "max_density": 0.02, "median_max": 2.5, "median_top_neuron": 1,
         "share_on_one_neuron": 1, "ce_loss_score_zero": 0.9}
    )  # fmt: skip
    assert sum(found["density"]["features"]) == 4
    assert sum(found["density"]["a1"]) == sum(A1_DENSITY.values()) == 3927
    nothing = beside_a1(np.zeros(5, int), 10, np.zeros(5), torch.eye(5), None)
    assert nothing["statistics"]["median_density"]["value"] is None
