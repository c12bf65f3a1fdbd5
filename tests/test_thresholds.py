"""Batch-topk's thresholds: the level is the mean smallest active value; rarely firing features lie below it; at the end
both are calibrated on a sample of rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import random_sae
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae.analysis.planted import PlantedRows
from sae.kernels.activations import DenseActs
from sae.training import loop
from sae.training.batch_topk_threshold import LEVEL_RATE, PATIENCE, calibrated, join, split, update_thresholds_
from sae.training.begun import resolve_in
from sae.training.config import TrainConfig
from sae.training.recipes import resolve
from sae.training.rows import Batch
from sae.training.state import TrainState

D_SAE, ROWS = 6, 50


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(seed: int, n: int) -> list[torch.Tensor]:
    """Activations of some batches; feature 0 is never on, feature 1 once in the last."""
    rng = np.random.default_rng(seed)
    found = rng.gamma(2.0, size=(n, ROWS, D_SAE)) * (rng.random((n, ROWS, D_SAE)) < 0.3)
    found[..., 0] = found[..., 1] = 0.0
    found[-1, 0, 1] = 0.05
    return list(torch.from_numpy(found).float())


def by_hand(activations: list[torch.Tensor], min_density: float) -> tuple[np.ndarray, np.ndarray]:
    """The docstring's recurrence, entry by entry in float64: thresholds, and what was added to b_enc."""
    level, lift, added = 0.0, np.zeros(D_SAE), np.zeros(D_SAE)
    for step, acts in enumerate(activations):
        dense = acts.double().numpy()
        least = min(dense[row, f] + lift[f] for row, f in zip(*dense.nonzero(), strict=True))
        level = least if step == 0 else (1 - LEVEL_RATE) * level + LEVEL_RATE * least
        for f in range(D_SAE):
            wanted = min_density * ROWS - (dense[:, f] > 0).sum()
            lift[f] = max(0.0, lift[f] + (level / PATIENCE * wanted if min_density else 0.0))
            added[f] += max(0.0, lift[f] - level)
            lift[f] = min(level, lift[f])
        level, lift = level - lift.min(), lift - lift.min()  # only differences of lifts rank
    return level - lift, added


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("min_density", [0.0, 0.1, 0.2])
def test_the_recurrence(min_density: float, sparse: bool) -> None:
    config = TrainConfig(min_density=min_density)
    threshold, b_enc = torch.zeros(D_SAE), torch.full((D_SAE,), -1.0)
    for step, acts in enumerate(found := batches(0, 40)):
        update_thresholds_(threshold, b_enc, DenseActs(acts).sparse() if sparse else DenseActs(acts), step, config)
    wanted, added = by_hand(found, min_density)
    np.testing.assert_allclose(threshold, wanted, rtol=1e-4)
    np.testing.assert_allclose(b_enc, added - 1, rtol=1e-4)
    assert (threshold[0] < threshold[2]) == (min_density > 0)
    assert (b_enc[0] > -1) == (min_density > 0)  # never above zero: only its bias can bring it back


@given(st.integers(0, 1000), st.floats(0, 0.2))
@settings(max_examples=25, deadline=None)
def test_thresholds_lie_between_zero_and_the_level(seed: int, min_density: float) -> None:
    threshold = torch.zeros(D_SAE)
    for step, acts in enumerate(batches(seed, 12)):
        update_thresholds_(threshold, torch.zeros(D_SAE), DenseActs(acts), step, TrainConfig(min_density=min_density))
        assert (threshold >= 0).all()
        assert threshold.amax() > 0


def test_a_batch_without_activations_moves_nothing() -> None:
    threshold = torch.rand(D_SAE)
    before = threshold.clone()
    update_thresholds_(
        threshold, torch.zeros(D_SAE), DenseActs(torch.zeros(ROWS, D_SAE)), 3, TrainConfig(min_density=0.1)
    )
    assert torch.equal(threshold, before)


def test_level_and_lift_are_the_threshold_of_inference_and_of_checkpoints() -> None:
    threshold = torch.tensor([0.5, 0.2, 0.5, 0.0])
    level, lift = split(threshold)
    assert level == 0.5
    torch.testing.assert_close(lift, torch.tensor([0.0, 0.3, 0.0, 0.5]))
    torch.testing.assert_close(join(level, lift), threshold)
    assert join(level, torch.tensor([-1.0, 0.0, 0.1, 9.0])).tolist() == pytest.approx([0.5, 0.5, 0.4, 0.0])


def level_by_hand(pre: np.ndarray, k: int, least_firings: int) -> np.ndarray:
    """The calibrated thresholds by search: the highest level that some pre-activation has and that gives k per row."""
    own = [sorted(column, reverse=True)[least_firings] if least_firings else np.inf for column in pre.T]
    for level in sorted({value for value in pre.flatten().tolist() if value > 0}, reverse=True):
        threshold = np.maximum(np.minimum(level, own), 0)
        if (pre > threshold).sum() >= k * len(pre):
            return threshold
    return np.zeros(pre.shape[1])


@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([0.0, 0.03, 0.05]), st.floats(0.0, 4.0))
@settings(max_examples=20, deadline=None)
def test_calibration_gives_k_per_row_and_each_feature_its_share(
    seed: int, k: int, min_density: float, estimate: float
) -> None:
    """Whatever the estimates of training were."""
    sae, x = random_sae(8, d_sae=12, activation="batchtopk", k=k), torch.randn(40, 8, generator=seeded(seed))
    sae.threshold.copy_(estimate * torch.rand(12, generator=seeded(seed + 1)))
    found = calibrated(sae, x, min_density)
    pre = sae.pre_acts(x).double().numpy()
    fired = pre > found.double().numpy()
    np.testing.assert_array_equal(fired, pre > level_by_hand(pre, k, round(min_density * 40)))
    assert fired.sum() == min(k * 40, (pre > 0).sum())
    assert (fired.sum(0) >= np.minimum((pre > 0).sum(0), round(min_density * 40))).all()


def test_calibration_without_enough_activations_keeps_all_there_are() -> None:
    sae = random_sae(8, d_sae=12, activation="batchtopk", k=12)
    assert not calibrated(sae, torch.randn(40, 8, generator=seeded(0))).any()


def test_calibration_does_not_depend_on_what_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = random_sae(8, d_sae=12, activation="batchtopk", k=2), torch.randn(50, 8, generator=seeded(1))
    whole = calibrated(sae, x, 0.1)
    monkeypatch.setattr("sae.training.batch_topk_threshold.CALIBRATED_AT_ONCE", 12 * 7)
    torch.testing.assert_close(calibrated(sae, x, 0.1), whole, rtol=0, atol=1e-6)


PLANTED = PlantedRows(n_truths=64, d_in=32, active=4.0, batch_tokens=256)


@pytest.mark.parametrize("recipe", ["batch-topk", "matryoshka", "balanced"])
def test_the_l0_on_rows_not_trained_on_is_k(tmp_path: Path, recipe: str) -> None:
    _, config = resolve(recipe, d_sae=64, k=4, tokens=256 * 200, batch_tokens=256)
    sae = loop.train(PLANTED, tmp_path, config)
    fresh = PLANTED.sample(20_000, 99)
    assert (sae.encode(fresh) > 0).sum(-1).double().mean().item() == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("recipe", ["batch-topk", "matryoshka"])
def test_a_run_of_version_0_1_ends_as_it_began(tmp_path: Path, recipe: str) -> None:
    """Its train.json lacks calibrate_threshold and has the lr and min_density of matryoshka then."""
    asked: dict[str, Any] = {"d_sae": 64, "k": 4, "tokens": 256 * 20, "batch_tokens": 256}
    _, today = resolve_in(tmp_path / "new", recipe, **asked)
    before = replace(today, lr=1e-3, calibrate_threshold=False, min_density=0.0)
    wanted = loop.train(PLANTED, tmp_path / "wanted", before)
    begin_as_version_0_1(tmp_path / "old", before)
    found = sae.train(PLANTED, tmp_path / "old", config=asked)
    assert torch.equal(found.threshold, wanted.threshold)
    assert found.config["train"]["calibrate_threshold"] is False
    assert found.config["train"]["min_density"] == 0
    assert not torch.equal(loop.train(PLANTED, tmp_path / "new", today).threshold, wanted.threshold)


def test_a_setting_that_is_named_is_not_taken_from_version_0_1(tmp_path: Path) -> None:
    begin_as_version_0_1(tmp_path, resolve("matryoshka", d_sae=64, tokens=4096, min_density=0.0)[1])
    with pytest.raises(ValueError, match=r"min_density is 0.0 there, 0.001 asked"):
        sae.train(PLANTED, tmp_path, config={"d_sae": 64, "tokens": 4096, "min_density": 0.001})


def begin_as_version_0_1(out: Path, config: TrainConfig) -> None:
    loop.bind_directory(out, replace(config, calibrate_threshold=False), {})
    recorded = json.loads((out / "train.json").read_text())
    del recorded["train"]["calibrate_threshold"]
    (out / "train.json").write_text(json.dumps(recorded))


class Weak:
    """Rows of 12 sparse directions; the test adds as many features that are never among the largest."""

    d_in, n_rows = 8, 10_000

    def __init__(self) -> None:
        self.directions = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))

    def draw(self, n: int, seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        on = (torch.rand(n, 12, generator=g) < 0.15) * (1 + torch.rand(n, 12, generator=g))
        return on @ self.directions + 0.05 * torch.randn(n, 8, generator=g)

    def batch(self, step: int) -> Batch:
        return Batch(self.draw(128, 1000 + step))

    def sample(self, n: int, seed: int) -> torch.Tensor:
        return self.draw(min(n, self.n_rows), seed)


@pytest.mark.parametrize("silent", ["too small", "negative everywhere"])
@pytest.mark.parametrize("min_density", [0.0, 0.01])
def test_features_that_never_rank_come_back_only_with_a_min_density(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_density: float, silent: str
) -> None:
    rows, start = Weak(), loop.start

    def start_half_weak(*args: object) -> TrainState:
        state = start(*args)  # type: ignore[arg-type]
        with torch.no_grad():
            if silent == "too small":
                state.sae.W_enc[:, 12:] *= 0.02
            else:
                state.sae.b_enc[12:] = -3.0
        return state

    monkeypatch.setattr(loop, "start", start_half_weak)
    _, config = resolve("balanced", d_sae=24, k=2, tokens=128 * 800, batch_tokens=128, min_density=min_density)
    sae = loop.train(rows, tmp_path, config)
    density = (sae.encode(rows.draw(20_000, 7)) > 0).double().mean(0)
    if min_density:
        assert (density > min_density / 3).all()
    else:
        assert (density[12:] == 0).sum() >= 5
