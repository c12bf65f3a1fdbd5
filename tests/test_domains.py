"""Domain quality and decoder geometry against brute force and planted cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae.evaluation import domains
from sae.evaluation.domains import DomainCounts, best_features, domain_quality
from sae.evaluation.geometry import A1_DENSITY, a1_match, geometry, nearest_cosines


def made_up(seed: int) -> DomainCounts:
    """Firings [features, domains] and tokens: feature 0 is domain 0, feature 1 half of domain 1, the rest noise."""
    rng = np.random.default_rng(seed)
    tokens = np.array([1000, 2000, 5000, 150])
    fired = rng.binomial(tokens, 0.02, size=(30, 4))
    fired[0] = [900, 10, 20, 0]
    fired[1] = [0, 1000, 0, 0]
    return DomainCounts(fired, tokens)


def test_the_best_features_are_chosen_on_one_text_and_judged_on_the_other() -> None:
    chosen, judged = made_up(0), made_up(1)
    judged.fired[0] = [800, 30, 20, 0]
    table = best_features(chosen, judged, 4)
    assert table[0]["feature"] == 0
    precision, recall = 800 / 850, 800 / 1000
    assert table[0]["precision"] == pytest.approx(precision)
    assert table[0]["recall"] == pytest.approx(recall)
    assert table[0]["f1"] == pytest.approx(2 / (1 / precision + 1 / recall))
    assert table[1]["f1"] == pytest.approx(2 / (1 + 2))
    assert table[3] is None  # too few tokens
    assert len(best_features(chosen, judged, 3)) == 3  # the fourth column is other text


def test_a_feature_chosen_by_luck_scores_low_on_the_other_text() -> None:
    tokens = np.array([500, 500])
    chosen = DomainCounts(np.array([[500, 0], [0, 500]]), tokens)
    judged = DomainCounts(np.array([[0, 500], [500, 0]]), tokens)
    assert [entry["f1"] for entry in best_features(chosen, judged, 2)] == [0, 0]


def test_pure_features() -> None:
    fired, tokens = made_up(0)
    quality = domain_quality(DomainCounts(fired, tokens), DomainCounts(fired, tokens), ["a", "b", "c", "d"])
    pure = [f for f in range(30) if fired[f].sum() >= domains.MIN_FIRINGS and fired[f].max() > 0.8 * fired[f].sum()]
    assert {0, 1} <= set(pure)
    assert quality["pure_features"] == len(pure)
    assert quality["pure_by_domain"]["b"] >= 1
    assert sum(quality["pure_by_domain"].values()) == len(pure)
    assert quality["mean_f1"] == pytest.approx(np.mean([quality["best_feature"][d]["f1"] for d in "abc"]))
    assert quality["best_feature"]["d"] is None


def test_no_domain_and_no_firing_are_no_error() -> None:
    nothing = DomainCounts(np.zeros((5, 1), int), np.zeros(1, int))
    assert domain_quality(nothing, nothing, [])["mean_f1"] is None
    silent = DomainCounts(np.zeros((5, 2), int), np.full(2, 300))
    quality = domain_quality(silent, silent, ["a", "b"])
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


def test_each_feature_of_a_neuron_basis_lies_on_one_neuron() -> None:
    found = geometry(torch.eye(8) * 3, np.ones(8, bool))
    assert found["top_neuron"]["p5"] == 1
    assert found["nearest_cosine"]["p95"] == 0
    assert geometry(torch.eye(8), np.zeros(8, bool))["top_neuron"]["median"] is None


def test_statistics_next_to_those_of_the_paper() -> None:
    count = np.array([0, 10, 100, 1000, 2000])
    found = a1_match(count, 100_000, np.array([0, 1, 2, 3, 5.0]), torch.eye(5), 0.9)
    values = {name: entry["value"] for name, entry in found["statistics"].items()}
    assert values == pytest.approx(
        {
            "l0": 0.0311,
            "median_density": 0.0055,
            "max_density": 0.02,
            "median_max": 2.5,
            "median_top_neuron": 1,
            "share_on_one_neuron": 1,
            "ce_loss_score_zero": 0.9,
        }
    )
    assert sum(found["density"]["features"]) == 4
    assert sum(found["density"]["a1"]) == sum(A1_DENSITY.values()) == 3927
    nothing = a1_match(np.zeros(5, int), 10, np.zeros(5), torch.eye(5), None)
    assert nothing["statistics"]["median_density"]["value"] is None
