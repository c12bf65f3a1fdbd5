"""Comparison of dictionaries against brute force on dense matrices, and against dictionaries whose answer is known."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from sae.analysis import feature_pairs
from sae.analysis.comparison import PairedBlock, compare
from sae.analysis.correlation import NeuronCorrelation, pair_blocks
from sae.analysis.matching import one_to_one, recovery
from sae.analysis.recorder import Recorder
from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import best_cosines

ROWS, D_IN = 600, 12


def sparse_acts(rows: int, features: int, share: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((rows, features)) < share) * rng.random((rows, features)).astype(np.float32)


def all_pairs(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    blocks = list(pair_blocks(sparse.csr_array(a), sparse.csr_array(b), masked=True))
    names = ("pearson", "masked_a", "masked_b")
    return {name: np.concatenate([getattr(block, name) for block in blocks]) for name in names}


def test_every_pair_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.analysis.correlation.PAIRS_AT_ONCE", 20)  # several slices
    a, b = sparse_acts(ROWS, 9, 0.2, 0), sparse_acts(ROWS, 6, 0.3, 1)
    b[:, 2] = a[:, 4] * 3  # the same feature at another scale
    b[:, 3] = np.where(np.arange(ROWS) < 300, a[:, 5], 0)  # a part of another: a split
    a[:, 0] = 0  # dead
    found = all_pairs(a, b)
    f, g = a.astype(np.float64), b.astype(np.float64)
    for i in range(9):
        for j in range(6):
            wanted = 0.0 if i == 0 else np.corrcoef(f[:, i], g[:, j])[0, 1]
            assert found["pearson"][i, j] == pytest.approx(wanted, abs=1e-9)
            for name, fires in (("masked_a", f[:, i] > 0), ("masked_b", g[:, j] > 0)):
                left, right = f[fires, i], g[fires, j]
                scale = np.linalg.norm(left) * np.linalg.norm(right)
                assert found[name][i, j] == pytest.approx(left @ right / scale if scale else 0.0, abs=1e-9), name
    assert found["pearson"][4, 2] == pytest.approx(1)
    assert found["masked_b"][5, 3] == pytest.approx(1)


def test_neuron_pairs_against_numpy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 5)), rng.random((200, 4)) + 100
    y[:, 1] = 2 * x[:, 3] + 1
    y[:, 2] = 7.0  # constant
    pairs = NeuronCorrelation(5, 4)
    for part in (slice(0, 90), slice(90, 200)):
        pairs.add(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    found = pairs.matrix()
    assert found[3, 1] == pytest.approx(1)
    assert not found[:, 2].any()
    wanted = np.corrcoef(x.T, y[:, [0, 1, 3]].T)[:5, 5:]
    np.testing.assert_allclose(found[:, [0, 1, 3]], wanted, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
def test_the_matching_is_the_best_of_all(n_a: int, n_b: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random((n_a, n_b)) < 0.6, rng.random((n_a, n_b)) + 0.01, 0.0)
    i, j = np.nonzero(weights)
    of_a, of_b = one_to_one(i, j, weights[i, j], (n_a, n_b))
    wide = np.pad(weights, ((0, 0), (0, n_a)))  # every a may stay alone
    best = max(sum(wide[k, p] for k, p in enumerate(chosen)) for chosen in permutations(range(n_a + n_b), n_a))
    total = sum(weights[k, partner] for k, partner in enumerate(of_a) if partner >= 0)
    assert total == pytest.approx(best)
    for k, partner in enumerate(of_a):
        assert partner < 0 or (of_b[partner] == k and weights[k, partner] > 0)
    assert (of_a >= 0).sum() == (of_b >= 0).sum()


def test_the_matching_of_many_equals_the_dense_one() -> None:
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((150, 120)) < 0.1, rng.random((150, 120)), 0.0)
    i, j = np.nonzero(weights)
    of_a, _ = one_to_one(i, j, weights[i, j], weights.shape)
    rows, columns = linear_sum_assignment(weights, maximize=True)
    assert sum(weights[k, p] for k, p in enumerate(of_a) if p >= 0) == pytest.approx(weights[rows, columns].sum())


def test_best_cosines_and_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.dictionary.directions.DIRECTIONS_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, D_IN, generator=generator)
    learned = torch.randn(33, D_IN, generator=generator)
    cosines = torch.nn.functional.cosine_similarity(truth[:, None], learned[None], dim=-1).numpy()
    found = best_cosines(truth, learned)
    np.testing.assert_array_equal(found.of_a, cosines.argmax(1))
    np.testing.assert_array_equal(found.of_b, cosines.argmax(0))
    np.testing.assert_allclose(found.cosine_b, cosines.max(0), atol=1e-6)
    measured = recovery(learned, truth)
    assert measured["mmcs_truth"] == pytest.approx(cosines.max(1).mean(), abs=1e-6)
    assert measured["mmcs_learned"] == pytest.approx(cosines.max(0).mean(), abs=1e-6)
    rows, columns = linear_sum_assignment(-cosines)
    assert measured["mcc"] == pytest.approx(cosines[rows, columns].mean(), abs=1e-6)


def test_recovery_is_one_for_the_truth_and_less_with_duplicates_and_gaps() -> None:
    truth = torch.eye(10)
    shuffled = truth[torch.randperm(10, generator=torch.Generator().manual_seed(0))] * 3
    assert recovery(shuffled, truth) == {"mmcs_truth": 1.0, "mmcs_learned": 1.0, "mcc": 1.0, "recovered": 1.0}
    halves = torch.cat([truth[:5], truth[:5]])  # five truths learned twice, five not at all
    found = recovery(halves, truth)
    assert found["mmcs_learned"] == 1
    assert found["mmcs_truth"] == found["mcc"] == found["recovered"] == 0.5


def test_the_recorder_holds_the_kept_rows_only() -> None:
    sae = random_sae(20, seed=3)
    x = torch.rand(50, D_IN, generator=torch.Generator().manual_seed(0))
    kept = torch.rand(50, generator=torch.Generator().manual_seed(1)) > 0.3
    recorder = Recorder(20)
    for part in (slice(0, 17), slice(17, 50)):
        recorder.add(sae.feature_acts(x[part]), kept[part])
    np.testing.assert_allclose(recorder.matrix().toarray(), sae.encode(x[kept]).numpy(), atol=1e-6)
    assert Recorder(4).matrix().shape == (0, 4)


# --- whole comparisons ---


def random_sae(d_sae: int, seed: int) -> SAE:
    sae = SAE(D_IN, d_sae)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return sae.requires_grad_(False)


def rearranged(sae: SAE, features: list[int]) -> SAE:
    """The same dictionary with its features in another order (or some of them)."""
    other = SAE(D_IN, len(features))
    with torch.no_grad():
        other.W_enc.copy_(sae.W_enc[:, features])
        other.b_enc.copy_(sae.b_enc[features])
        other.W_dec.copy_(sae.W_dec[features])
        other.b_dec.copy_(sae.b_dec)
    return other.requires_grad_(False)


def same_blocks(rows: int = ROWS, seed: int = 0) -> list[PairedBlock]:
    x = torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed))
    kept = torch.ones(rows, dtype=torch.bool)
    kept[::11] = False
    return [PairedBlock(x[i : i + 250], x[i : i + 250], kept[i : i + 250]) for i in range(0, rows, 250)]


def test_a_dictionary_in_another_order_is_found_again() -> None:
    sae = random_sae(16, seed=0)
    order = np.random.default_rng(0).permutation(16).tolist()
    found = compare(sae, rearranged(sae, order), same_blocks(), tokens=ROWS, same_space=True)
    table = found.tables["features_a"]
    back = np.argsort(order)
    assert found.summary["counts"]["a"]["analysed"] == 16
    for name in ("best", "matched", "cosine_best"):
        np.testing.assert_array_equal(table[name], back, err_msg=name)
    np.testing.assert_allclose(table["correlation"], 1, atol=1e-6)
    np.testing.assert_allclose(table["cosine"], 1, atol=1e-6)
    np.testing.assert_array_equal(found.tables["features_b"]["best"], order)
    assert found.summary["counts"]["a"]["unmatched"] == found.summary["counts"]["b"]["unmatched"] == 0
    assert found.summary["summary"]["features_a_to_b"]["median"] == pytest.approx(1)
    assert found.summary["summary"]["shuffled"]["median"] < 0.2
    assert found.summary["summary"]["neurons_a_to_b"]["median"] is None  # they are the same neurons
    assert found.summary["tokens"] == sum(int(block.kept.sum()) for block in same_blocks())


def test_a_comparison_against_numpy() -> None:
    a = random_sae(16, seed=0)
    b = SAE(D_IN, 5).requires_grad_(False)
    for name, parameter in b.named_parameters():
        other = random_sae(2, seed=9).get_parameter(name)
        mine = rearranged(a, [3, 4, 5]).get_parameter(name)
        dim = 1 if name == "W_enc" else 0
        parameter.copy_(mine if name == "b_dec" else torch.cat([mine, other], dim))
    b.b_enc[4] = -100.0  # never fires
    found = compare(a, b, same_blocks(), tokens=ROWS, same_space=True)
    x = torch.cat([block.x_a[block.kept] for block in same_blocks()])
    f, g = a.encode(x).double().numpy(), b.encode(x).double().numpy()
    correlation = np.corrcoef(f.T, g[:, :4].T)[:16, 16:]
    table = found.tables["features_a"]
    np.testing.assert_allclose(table["correlation"], correlation.max(1), atol=1e-5)
    np.testing.assert_array_equal(table["best"], correlation.argmax(1))
    np.testing.assert_array_equal(table["firings"], (f > 0).sum(0))
    assert found.tables["features_b"]["best"].mask.tolist() == [False] * 4 + [True]
    assert np.isnan(found.tables["features_b"]["correlation"][4])
    assert found.summary["counts"]["b"]["analysed"] == 4
    assert table["matched"][3:6].tolist() == [0, 1, 2]
    assert found.summary["counts"]["a"]["unmatched"] == 16 - found.summary["counts"]["a"]["matched"]
    neurons = np.corrcoef(f.T, x.double().numpy().T)[:16, 16:]
    np.testing.assert_array_equal(table["neuron"], neurons.argmax(1))
    np.testing.assert_allclose(table["neuron_correlation"], neurons.max(1), atol=1e-4)
    for row in range(len(found.tables["edges"]["a"])):
        edge = {name: column[row] for name, column in found.tables["edges"].items()}
        i, j = edge["a"], edge["b"]
        on = f[:, i] > 0
        wanted = f[on, i] @ g[on, j] / np.linalg.norm(f[on, i]) / np.linalg.norm(g[on, j])
        assert edge["masked_a"] == pytest.approx(wanted, abs=1e-5)
        assert edge["masked"] == max(edge["masked_a"], edge["masked_b"]) >= feature_pairs.EDGE_MASKED
        cosine = torch.cosine_similarity(a.W_dec[i], b.W_dec[j], dim=0).item()
        assert edge["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert (np.diff(found.tables["edges"]["masked"]) <= 0).all()


def test_two_models_can_be_compared_by_activations_and_logits_only() -> None:
    """B's model sees A's activations rotated: the features are the same, the neurons are not."""
    a = random_sae(16, seed=0)
    generator = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator)).Q
    b = rearranged(a, list(range(16)))
    b.W_enc.copy_(rotation.T @ a.W_enc)
    b.W_dec.copy_(a.W_dec @ rotation)
    b.b_dec.copy_(a.b_dec @ rotation)
    blocks = [block._replace(x_b=block.x_a @ rotation) for block in same_blocks()]
    vocabulary = torch.randn(D_IN, 40, generator=generator)
    found = compare(
        a,
        b,
        blocks,
        tokens=ROWS,
        same_space=False,
        logit_weights=(lambda d: d @ vocabulary, lambda d: d @ rotation.T @ vocabulary),
    )
    table = found.tables["features_a"]
    np.testing.assert_array_equal(table["best"], np.arange(16))
    np.testing.assert_allclose(table["correlation"], 1, atol=1e-5)
    np.testing.assert_allclose(table["logit_correlation"], 1, atol=1e-5)
    assert np.isnan(table["cosine"]).all()
    assert table["cosine_best"].mask.all()
    assert found.summary["summary"]["decoder_a_to_b"]["mean"] is None
    assert found.summary["summary"]["neurons_a_to_b"]["n"] == D_IN
    assert found.summary["summary"]["neurons_a_to_b"]["median"] < 0.9


def test_no_tokens_and_different_tokens_are_refused() -> None:
    sae = random_sae(4, seed=0)
    with pytest.raises(ValueError, match="no kept token"):
        compare(sae, sae, [], tokens=0, same_space=True)
    with pytest.raises(ValueError, match="3 tokens of one, 4 of the other"):
        next(pair_blocks(sparse.csr_array(np.ones((3, 2))), sparse.csr_array(np.ones((4, 2)))))


def test_dictionaries_that_share_nothing_match_nothing() -> None:
    a, b = random_sae(4, seed=0), random_sae(4, seed=1)
    b.b_enc.fill_(-100.0)
    found = compare(a, b, same_blocks(), tokens=ROWS, same_space=True)
    assert found.summary["counts"]["b"]["analysed"] == found.summary["counts"]["a"]["matched"] == 0
    assert found.summary["summary"]["features_a_to_b"]["median"] is None
    assert len(found.tables["edges"]["a"]) == 0
