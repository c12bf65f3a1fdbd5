"""Panels computed from the firings (together, next, labels, Δloss) against dense brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT
from test_indexing import D_SAE, SEQ_LEN, Built, make_sae

from sae.indexing import ablation_effects, rules
from sae.indexing.build import index
from sae.indexing.firings import systematic_sample
from sae.lm import NativeModel
from store.feature_sort import SortedFirings


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_model: NativeModel) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation_effects, "PER_INTERVAL", 250)  # every firing: the estimate is then exact
        return Built(tmp_path_factory.mktemp("index") / "features.zarr", tiny_model, make_sae(), per_block=3)


def stored(built: Built) -> np.ndarray:
    """The activations as the index holds them, [rows, d_sae] float64."""
    return built.f.astype(np.float16).astype(np.float64)


def test_tokens_are_counted_at_kept_positions(built: Built) -> None:
    expected = np.bincount(built.tokens[built.keep].numpy(), minlength=built.index.d_vocab)
    np.testing.assert_array_equal(built.index.token_counts, expected)
    assert built.index.occurrences(int(expected.argmax())) == expected.max()


def test_features_that_fire_together_against_dense_counts(built: Built) -> None:
    f, kept = stored(built), built.keep.flatten().numpy()
    fires = f > 0
    met = fires.T.astype(float) @ fires
    union = fires.sum(0)[:, None] + fires.sum(0) - met
    jaccard = np.where(met >= 3, met / np.maximum(union, 1), 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = np.where(met >= 3, np.nan_to_num(np.corrcoef(f[kept].T)), -1.0)
    for truth, name in ((jaccard, "together/jaccard"), (pearson, "correlated/pearson")):
        np.fill_diagonal(truth, -1.0)
        for feature in range(D_SAE):
            ids = built.index.panel(name.split("/")[0] + "/id", feature)
            values = built.index.panel(name, feature)
            listed = ids >= 0
            assert feature not in ids
            np.testing.assert_allclose(values[listed], truth[feature, ids[listed]], atol=1e-4)
            expected = np.sort(truth[feature][met[feature] >= 3])[::-1]
            expected = expected[expected > -1][: len(ids)]
            np.testing.assert_allclose(values[: len(expected)], expected, atol=1e-4)
            assert not values[~listed].any()


def test_features_that_fire_next_against_dense_counts(built: Built) -> None:
    fires = (stored(built) > 0).reshape(-1, SEQ_LEN, D_SAE)
    keep = built.keep.numpy()
    goes_on = keep[:, 1:, None] & fires[:, :-1]
    met = np.einsum("cpf,cpg->fg", goes_on.astype(float), fires[:, 1:].astype(float))
    share = met / np.maximum(goes_on.sum((0, 1))[:, None], 1)
    density = fires.sum((0, 1)) / keep.sum()
    gain = np.where(met >= 3, share - density, -np.inf)
    for feature in range(D_SAE):
        ids, shares, lifts = (built.index.panel(f"successors/{n}", feature) for n in ("id", "share", "lift"))
        listed = ids >= 0
        np.testing.assert_allclose(shares[listed], share[feature, ids[listed]], atol=1e-5)
        np.testing.assert_allclose(lifts[listed], (share[feature] / np.maximum(density, 1e-12))[ids[listed]], rtol=1e-4)
        expected = np.sort(gain[feature][np.isfinite(gain[feature])])[::-1][: len(ids)]
        np.testing.assert_allclose(gain[feature, ids[listed]], expected, atol=1e-5)


def test_systematic_sampling_gives_every_firing_the_same_chance() -> None:
    rng = np.random.default_rng(0)
    assert systematic_sample(5, 8, rng).tolist() == [0, 1, 2, 3, 4]
    drawn = np.zeros(10)
    for _ in range(2000):
        places = systematic_sample(10, 4, rng)
        assert len(np.unique(places)) == 4
        drawn[places] += 1
    assert abs(drawn - 800).max() < 120  # 800 expected each, standard deviation 22


def test_delta_loss_is_the_mean_over_the_firings_of_a_spliced_model(built: Built) -> None:
    f, keep = stored(built).reshape(-1, SEQ_LEN, D_SAE), built.keep.numpy()
    clean = built.model.token_losses(built.tokens).double().numpy()
    predicts = keep[:, :-1] & keep[:, 1:]
    stats = built.index.stats["delta_loss"]
    for feature in range(D_SAE):
        acts = f[:, :, feature]
        if not acts.any():
            assert np.isnan(stats[feature])
            continue
        a, row = torch.from_numpy(acts).float(), built.sae.W_dec[feature]
        cut = built.model.token_losses(built.tokens, HOOK_POINT, lambda x, a=a, row=row: x - a[..., None] * row)
        delta = cut.double().numpy() - clean
        where = (acts[:, :-1] > 0) & predicts
        place = ablation_effects.interval_of(acts, float(acts.max()))
        counts = np.bincount(place[acts > 0], minlength=11)
        inside = [delta[where & (place[:, :-1] == i)] for i in range(11)]
        sampled = np.array([len(part) for part in inside])
        np.testing.assert_array_equal(built.index.panel("effects/interval_samples", feature), sampled)
        expected = [np.abs(part).mean() if len(part) else 0.0 for part in inside]
        np.testing.assert_allclose(built.index.panel("effects/interval_abs", feature), expected, atol=2e-4)
        weights = np.where(sampled > 0, counts, 0)
        mean = np.array([part.mean() if len(part) else 0.0 for part in inside])
        np.testing.assert_allclose(stats[feature], (mean * weights).sum() / weights.sum(), atol=2e-4)


def planted(fires: np.ndarray, tokens: np.ndarray, keep: np.ndarray, domain: np.ndarray) -> SortedFirings:
    """Sorted firings of the features `fires` [contexts, pos, d_sae]."""
    dense = (fires & keep[..., None]).reshape(-1, fires.shape[-1])
    feature, rows = np.nonzero(dense.T)
    by_row, row_features = np.nonzero(dense)
    ptr = np.concatenate([[0], np.cumsum(dense.sum(0))])
    row_ptr = np.concatenate([[0], np.cumsum(dense.sum(1))])
    ones = np.ones(len(rows), np.float16)
    assert len(feature) == len(by_row)
    return SortedFirings(ptr, rows, ones, row_ptr, row_features, ones, tokens, keep, domain)


def test_labels_find_planted_rules_and_score_them_on_unseen_contexts() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 12, (240, 20)).astype(np.uint32)
    keep = rng.random(tokens.shape) < 0.9
    domain = np.repeat(np.arange(240) // 2 % 3, 20).reshape(240, 20)
    before = np.full(tokens.shape, 99)
    before[:, 1:] = np.where(keep[:, :-1], tokens[:, :-1], 99)
    noise = rng.random(tokens.shape)
    fires = np.stack(
        [
            (tokens == 3) | (tokens == 5),
            before == 7,
            (before == 2) & (tokens == 4),
            domain == 1,
            (tokens == 6) & (noise < 0.5),
            np.zeros(tokens.shape, bool),
        ],
        -1,
    )
    found = rules.panels(planted(fires, tokens, keep, domain))
    kinds = [rules.KINDS[k] if k >= 0 else "" for k in found["label/kind"]]
    assert kinds == ["token", "after", "pair", "domain", "token", ""]
    keys = [{tuple(k) for k in each.tolist() if k != [-1, -1]} for each in found["label/keys"]]
    assert keys[:5] == [{(-1, 3), (-1, 5)}, {(7, -1)}, {(2, 4)}, {(1, -1)}, {(-1, 6)}]
    np.testing.assert_allclose(found["label/score"][:4], 1.0)
    odd = keep[1::2] & (tokens[1::2] == 6)
    precision = fires[1::2, :, 4][odd].mean()
    np.testing.assert_allclose(found["label/score"][4], [precision, 1.0, 2 * precision / (1 + precision)], rtol=1e-5)
    assert not found["label/score"][5].any()


def test_a_rule_that_held_by_chance_scores_low_on_unseen_contexts() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 200, (40, 25)).astype(np.uint32)
    keep = np.ones(tokens.shape, bool)
    fires = (rng.random(tokens.shape) < 0.05)[..., None]
    found = rules.panels(planted(fires, tokens, keep, np.zeros(tokens.shape, int)))
    assert found["label/score"][0, 2] < 0.25  # learned from noise in one half, it predicts nothing in the other


def test_panels_survive_a_dictionary_that_never_fires(tiny_model: NativeModel, tmp_path: Path) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    built = Built(tmp_path / "features.zarr", tiny_model, sae, per_block=7)
    assert (built.index.column("together/id") == -1).all()
    assert (built.index.column("label/kind") == -1).all()
    assert np.isnan(built.index.stats["delta_loss"]).all()


def test_the_last_resampling_of_a_feature_is_kept(tiny_model: NativeModel) -> None:
    class Sink:
        def append(self, *_: object) -> None: ...

        def finish(self, panels: dict[str, np.ndarray], from_firings: object = None) -> Path:
            self.panels = panels
            return Path()

    sink = Sink()
    index(make_sae(), tiny_model, [], sink, hook_point=HOOK_POINT, tokens=0, resampled={1: 3, 4: 9})
    step = sink.panels["stats/resampled_step"]
    assert (step[1], step[4]) == (3, 9)
    assert (step == -1).sum() == D_SAE - 2
