"""Constraint, schedule, initialisation and resampling against closed forms and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import spread_rows
from sae.kernels import BACKENDS, choose
from sae.training import adam, initialise, resample
from sae.training.config import TrainConfig

D_IN, D_SAE = 5, 12


def kaiming(sae: SAE, rows: Tensor, seed: int) -> None:
    initialise.kaiming_(sae, rows, rows, TrainConfig(seed=seed))


def from_data(sae: SAE, rows: Tensor, seed: int) -> None:
    initialise.from_data_(sae, rows, rows, TrainConfig(seed=seed))


def trained_sae(seed: int = 0, kernels: str = "auto") -> tuple[SAE, adam.Adam]:
    """A dictionary after some Adam steps, so that every moment is nonzero."""
    sae = SAE(D_IN, D_SAE)
    kaiming(sae, torch.zeros(1, D_IN), seed)
    optimizer = adam.Adam(sae, choose(kernels), beta1=0.9)
    g = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in sae.parameters():
            parameter.grad += torch.randn(parameter.shape, generator=g)
        optimizer.step(1e-2)
    return sae, optimizer


# --- decoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", BACKENDS)
def test_adam_on_a_dictionary_is_torchs_with_unit_decoder_rows(kernels: str) -> None:
    """Torch's Adam in float64 on the gradient without its part along each decoder row, which is then normalised."""
    sae, optimizer = trained_sae(kernels=kernels)
    twin = SAE(D_IN, D_SAE).double()
    twin_sae = SAE(D_IN, D_SAE)
    kaiming(twin_sae, torch.zeros(1, D_IN), 0)
    twin.load_state_dict(twin_sae.state_dict())
    torchs = torch.optim.Adam(twin.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in twin.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=g).double()
        row = twin.W_dec.detach()
        twin.W_dec.grad -= (twin.W_dec.grad * row).sum(1, keepdim=True) * row
        torchs.step()
        with torch.no_grad():
            twin.W_dec /= twin.W_dec.norm(dim=1, keepdim=True)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.double(), twin.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name)
        assert not parameter.grad.any(), "a step leaves zero gradients for the next"
        moment = torchs.state[twin.get_parameter(name)]["exp_avg_sq"]
        torch.testing.assert_close(optimizer.moments[name]["exp_avg_sq"].double(), moment, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_thresholds_move_by_their_own_rate_and_not_below_zero(kernels: str) -> None:
    """Torch's Adam in float64 with 16 times the rate for the thresholds."""
    sae = SAE(D_IN, D_SAE, activation="jumprelu")
    with torch.no_grad():
        sae.threshold.copy_(torch.linspace(0.01, 3.0, D_SAE))
    twin = {name: p.detach().double().clone().requires_grad_() for name, p in sae.named_parameters()}
    others = [p for name, p in twin.items() if name != "threshold"]
    torchs = torch.optim.Adam([{"params": others}, {"params": [twin["threshold"]], "lr": 16e-3}], lr=1e-3)
    optimizer = adam.Adam(sae, choose(kernels), beta1=0.9, unit_norm=False, threshold_lr_ratio=16.0)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, parameter in sae.named_parameters():
            parameter.grad += torch.rand(parameter.shape, generator=g) + 0.1
            twin[name].grad = parameter.grad.double()
        optimizer.step(1e-3)
        torchs.step()
    assert (twin["threshold"] < 0).any()
    for name, parameter in sae.named_parameters():
        expected = twin[name].clamp_min(0) if name == "threshold" else twin[name]
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_adam_continues_from_its_saved_tensors() -> None:
    sae, optimizer = trained_sae()
    other = SAE(D_IN, D_SAE)
    other.load_state_dict(sae.state_dict())
    again = adam.Adam(other, choose(), beta1=0.9)
    again.restore({name: t.clone() for name, t in optimizer.tensors().items()}, optimizer.step_count)
    for mine, its in ((sae, optimizer), (other, again)):
        for parameter in mine.parameters():
            parameter.grad += 0.5
        its.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), other.parameters(), strict=True))


def test_decoder_rows_become_unit_and_keep_their_direction() -> None:
    sae = SAE(D_IN, D_SAE)
    rows = torch.randn(D_SAE, D_IN) * torch.logspace(-3, 3, D_SAE)[:, None]
    with torch.no_grad():
        sae.W_dec.copy_(rows)
    adam.normalise_decoder_(sae)
    torch.testing.assert_close(sae.W_dec.detach(), rows / rows.norm(dim=1, keepdim=True))


# --- schedule --------------------------------------------------------------------------------------------------------


def test_the_learning_rate_where_its_phases_meet() -> None:
    config = TrainConfig(tokens=1000, batch_tokens=1, lr=2.0, warmup_share=0.1, decay_share=0.2)
    rate = [adam.learning_rate(step, config) for step in range(1000)]
    assert rate[0] == pytest.approx(2.0 / 100)
    assert rate[98] == pytest.approx(2.0 * 99 / 100)
    assert rate[99] == rate[100] == rate[799] == rate[800] == 2.0
    assert rate[801] == pytest.approx(2.0 * 199 / 200)
    assert rate[999] == pytest.approx(2.0 / 200)
    np.testing.assert_allclose(np.diff(rate[:100]), 2.0 / 100)
    np.testing.assert_allclose(np.diff(rate[800:]), -2.0 / 200)


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_learning_rate_is_positive_and_never_above_lr(steps: int, warmup: float, decay: float) -> None:
    config = TrainConfig(tokens=steps, batch_tokens=1, lr=0.5, warmup_share=warmup, decay_share=decay)
    assert all(0 < adam.learning_rate(step, config) <= 0.5 for step in range(steps))


def test_no_warmup_and_no_decay_is_constant() -> None:
    config = TrainConfig(tokens=50, batch_tokens=1, lr=0.1, warmup_share=0, decay_share=0)
    assert {adam.learning_rate(step, config) for step in range(50)} == {0.1}


# --- start -----------------------------------------------------------------------------------------------------------


def brute_median(rows: np.ndarray) -> np.ndarray:
    """argmin Σ‖x − m‖ by a shrinking pattern search over 2-D (no derivative, no division by a distance)."""

    def cost(m: np.ndarray) -> float:
        return float(np.linalg.norm(rows - m, axis=1).sum())

    best = min(rows, key=cost) if len(rows) else np.zeros(2)
    step = float(np.ptp(rows)) + 1.0
    while step > 1e-9:
        around = [best + step * np.array([math.cos(a), math.sin(a)]) for a in np.linspace(0, 2 * np.pi, 17)[:-1]]
        nearest = min(around, key=cost)
        if cost(nearest) < cost(best):
            best = nearest
        else:
            step /= 2
    return best


@pytest.mark.parametrize("seed", range(6))
def test_geometric_median_against_a_brute_force_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_t(2, size=(31, 2)) + [3.0, -1.0]
    found = initialise.geometric_median(torch.from_numpy(rows), iterations=2000, tolerance=1e-12).numpy()
    np.testing.assert_allclose(found, brute_median(rows), atol=1e-4)


def test_geometric_median_leaves_a_data_point_that_is_not_the_median() -> None:
    """The mean (where the search starts) is itself a row here; Weiszfeld's plain iteration would stay on it."""
    rows = torch.tensor([[0.0, 0.0], [-3.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(initialise.geometric_median(rows), torch.tensor([1.0, 0.0]), rtol=0, atol=1e-4)


def test_geometric_median_of_equal_rows_is_that_row() -> None:
    rows = torch.tensor([[0.1, -2.0, 5.0]]).expand(7, 3)
    torch.testing.assert_close(initialise.geometric_median(rows), rows[0])
    torch.testing.assert_close(initialise.geometric_median(torch.zeros(4, 3)), torch.zeros(3))


def test_geometric_median_is_not_dragged_by_outliers() -> None:
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    rows[:20] = 1e6
    assert initialise.geometric_median(rows).abs().max() < 1


def data_rows(seed: int = 0, n: int = 300) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)).relu() * 3 + 1


@pytest.mark.parametrize("start", [kaiming, from_data])
def test_initialisation(start: Callable[..., None]) -> None:
    rows = data_rows()
    sae, again, other = (SAE(D_IN, 40, activation="topk", k=2) for _ in range(3))
    start(sae, rows, seed=3)
    start(again, rows, seed=3)
    start(other, rows, seed=4)
    assert torch.equal(sae.b_dec, initialise.geometric_median(rows))
    assert not sae.b_enc.any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))
    assert not torch.equal(sae.W_dec, other.W_dec)


def test_tied_weights_are_short_and_b_dec_is_zero() -> None:
    sae = SAE(D_IN, 40, pre_bias=False)
    initialise.tied_(sae, data_rows(), data_rows(), TrainConfig(seed=3))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((40,), 0.1))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_dec.any()
    assert not sae.b_enc.any()


def test_thresholds_start_where_the_sample_has_the_target_l0() -> None:
    rows = data_rows()
    for target_l0, expected in ((0.0, None), (3.0, 3.0)):
        sae = SAE(D_IN, 40, activation="jumprelu", pre_bias=False)
        initialise.from_data_(sae, rows, rows, TrainConfig(target_l0=target_l0, threshold_init=0.1))
        assert len(set(sae.threshold.tolist())) == 1
        l0 = (sae.encode(rows) > 0).sum(1).double().mean().item()
        assert l0 == pytest.approx(expected, rel=0.01) if expected else l0 > 10


def test_kaiming_weights_are_pytorchs_and_untied() -> None:
    sae = SAE(64, 4000)
    kaiming(sae, torch.randn(100, 64), seed=3)
    assert sae.W_enc.abs().max() <= 64**-0.5
    assert sae.W_enc.std().item() == pytest.approx(64**-0.5 / math.sqrt(3), rel=0.01)
    assert torch.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=1).mean().abs() < 0.02


def test_data_weights_are_rows_of_the_data_at_the_scale_that_reconstructs_best() -> None:
    rows = data_rows()
    sae = SAE(D_IN, 40, activation="topk", k=2)
    from_data(sae, rows, seed=0)
    directions = torch.nn.functional.normalize(rows - sae.b_dec, dim=-1)
    cosines = sae.W_dec @ directions.T
    torch.testing.assert_close(cosines.amax(1), torch.ones(40))
    assert len(set(cosines.argmax(1).tolist())) == 40  # no row twice
    alpha = sae.W_enc[:, 0].norm()
    torch.testing.assert_close(sae.W_enc, alpha * sae.W_dec.T)

    def error(factor: float) -> float:
        scaled = SAE(D_IN, 40, activation="topk", k=2)
        scaled.load_state_dict(sae.state_dict())
        with torch.no_grad():
            scaled.W_enc *= factor
            return (rows - scaled(rows)).pow(2).sum().item()

    assert error(1.0) < min(error(0.9), error(1.1))


def test_spread_rows_takes_each_direction_before_any_twice() -> None:
    corners = torch.eye(4).repeat_interleave(50, 0)  # four directions, fifty equal rows each
    chosen = spread_rows(corners, 10, torch.Generator().manual_seed(0))
    assert sorted((chosen // 50).tolist()) == [0, 1, 2, 3]  # after four, no row is left at a distance above 0


def test_spread_rows_never_takes_a_zero_row() -> None:
    rows = torch.cat([torch.zeros(20, 3), torch.eye(3)])
    chosen = spread_rows(rows, 3, torch.Generator().manual_seed(1))
    assert sorted(chosen.tolist()) == [20, 21, 22]


# --- resampling (Bricken et al. 2023) --------------------------------------------------------------------------------

DEAD = torch.tensor([1, 4, 5, 11])
ALIVE = torch.tensor([i for i in range(D_SAE) if i not in DEAD.tolist()])


def resampled(seed: int = 0) -> tuple[SAE, SAE, dict, dict, Tensor, Tensor]:
    """before, after, Adam's state before and after, the rows, the rows chosen."""
    sae, optimizer = trained_sae()
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, D_IN))
    before = SAE(D_IN, D_SAE)
    before.load_state_dict(sae.state_dict())

    def moments() -> dict:
        return {n: {k: v.clone() for k, v in optimizer.moments[n].items()} for n, _ in sae.named_parameters()}

    held = moments()
    rows = torch.randn(30, D_IN, generator=torch.Generator().manual_seed(seed)) * 3
    losses = torch.rand(30, generator=torch.Generator().manual_seed(seed + 1))
    chosen = resample.resample_(sae, optimizer, DEAD, rows, losses, torch.Generator().manual_seed(seed))
    return before, sae, held, moments(), rows, chosen


def test_resampled_features_point_at_their_rows() -> None:
    before, after, _, _, rows, chosen = resampled()
    alive_norm = before.W_enc[:, ALIVE].double().norm(dim=0).mean()
    for feature, row in zip(DEAD.tolist(), chosen.tolist(), strict=True):
        direction = rows[row].double()
        direction /= direction.norm()
        torch.testing.assert_close(after.W_dec[feature].double(), direction, rtol=0, atol=1e-6)
        torch.testing.assert_close(after.W_enc[:, feature].double(), 0.2 * alive_norm * direction, rtol=1e-5, atol=1e-7)
        assert after.b_enc[feature] == 0
        assert after.W_dec[feature].norm().item() == pytest.approx(1, abs=1e-6)


def test_resampling_leaves_other_features_unchanged_bit_for_bit() -> None:
    before, after, _, _, _, _ = resampled()
    assert torch.equal(before.W_dec[ALIVE], after.W_dec[ALIVE])
    assert torch.equal(before.W_enc[:, ALIVE], after.W_enc[:, ALIVE])
    assert torch.equal(before.b_enc[ALIVE], after.b_enc[ALIVE])
    assert torch.equal(before.b_dec, after.b_dec)


def test_resampling_resets_exactly_the_moments_of_the_parameters_it_set() -> None:
    _, _, held, now, _, _ = resampled()
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not now["W_dec"][moment][DEAD].any()
        assert not now["W_enc"][moment][:, DEAD].any()
        assert not now["b_enc"][moment][DEAD].any()
        assert held["W_dec"][moment].all()  # so that the zeros above say something
        assert torch.equal(now["W_dec"][moment][ALIVE], held["W_dec"][moment][ALIVE])
        assert torch.equal(now["W_enc"][moment][:, ALIVE], held["W_enc"][moment][:, ALIVE])
        assert torch.equal(now["b_enc"][moment][ALIVE], held["b_enc"][moment][ALIVE])
        assert torch.equal(now["b_dec"][moment], held["b_dec"][moment])


def test_rows_are_chosen_in_proportion_to_their_squared_loss() -> None:
    sae, optimizer = trained_sae()
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 4.0])
    rows = torch.randn(6, D_IN)
    dead = torch.arange(D_SAE - 2)
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([resample.resample_(sae, optimizer, dead, rows, losses, generator) for _ in range(1000)])
    seen = np.bincount(draws.numpy(), minlength=6)
    expected = (losses.numpy() ** 2) / (losses.numpy() ** 2).sum() * len(draws)
    assert seen[0] == 0
    chi_square = float(((seen - expected)[1:] ** 2 / expected[1:]).sum())
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001
    by_loss = losses.numpy() / losses.numpy().sum() * len(draws)
    assert float(((seen - by_loss)[1:] ** 2 / by_loss[1:]).sum()) > 100  # so it is not P ∝ loss


def test_resampling_when_every_feature_is_dead() -> None:
    sae, optimizer = trained_sae()
    mean_norm = sae.W_enc.detach().norm(dim=0).mean()
    everything = torch.arange(D_SAE)
    resample.resample_(
        sae, optimizer, everything, torch.randn(9, D_IN), torch.ones(9), torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(sae.W_enc.norm(dim=0), (0.2 * mean_norm).expand(D_SAE))


def reseeded(seed: int = 0) -> tuple[SAE, SAE, Tensor, Tensor, Tensor]:
    """A TopK dictionary before and after, the rows, their squared errors, the rows chosen for the dead features."""
    before, after = (SAE(D_IN, D_SAE, activation="topk", k=3) for _ in range(2))
    rows = data_rows(seed)
    from_data(before, rows, seed)
    with torch.no_grad():
        before.W_enc[:, DEAD] *= 1e-3
    after.load_state_dict(before.state_dict())
    losses = (rows - before(rows)).pow(2).sum(-1).detach()
    losses[100:] = 0.0  # never drawn
    optimizer = adam.Adam(after, choose(), beta1=0.9)
    for moment in optimizer.tensors().values():
        moment.fill_(1.0)
    chosen = resample.reseed_(after, optimizer, DEAD, rows, losses, torch.Generator().manual_seed(seed))
    for name, moments in optimizer.moments.items():
        for moment in moments.values():
            forgotten = {"W_enc": moment.mT if moment.dim() == 2 else moment, "b_dec": torch.zeros(12)}.get(
                name, moment
            )
            assert not forgotten[DEAD].any()
            assert moment.any()
    return before, after, rows, losses, chosen


@pytest.mark.parametrize("encoded_at_once", [resample.ENCODED_AT_ONCE, 1])
def test_reseeded_features_rank_in_the_middle_on_their_input_and_write_its_error(
    monkeypatch: pytest.MonkeyPatch, encoded_at_once: int
) -> None:
    monkeypatch.setattr(resample, "ENCODED_AT_ONCE", encoded_at_once)  # 1: a row at a time
    before, after, rows, _, chosen = reseeded()
    assert len(set(chosen.tolist())) == len(DEAD)
    assert (chosen < 100).all()
    for feature, row in zip(DEAD.tolist(), chosen.tolist(), strict=True):
        x = rows[row].double()
        old = before.encode(rows[row]).double()
        own = (x - after.b_dec.double()) @ after.W_enc[:, feature].double()
        assert own.item() == pytest.approx(old.sort(descending=True).values[1].item(), rel=1e-5)  # the 2nd of 3
        cosine = torch.cosine_similarity(after.W_enc[:, feature], rows[row] - after.b_dec, dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-6)
        lacking = x - before(rows[row]).double()
        torch.testing.assert_close(after.W_dec[feature].double(), lacking / lacking.norm(), rtol=0, atol=1e-5)
        assert after.b_enc[feature] == 0
    assert torch.equal(before.W_enc[:, ALIVE], after.W_enc[:, ALIVE])
    assert torch.equal(before.W_dec[ALIVE], after.W_dec[ALIVE])


def test_reseeding_takes_bad_rows_that_are_far_from_each_other() -> None:
    sae = SAE(4, 6, activation="topk", k=1)
    kaiming(sae, torch.zeros(1, 4), 0)
    optimizer = adam.Adam(sae, choose(), beta1=0.9)
    corners = torch.eye(4).repeat_interleave(25, 0) * 2
    losses = torch.ones(100)
    losses[75:] = 0.0  # the fourth corner is reconstructed: never drawn
    before = sae.W_dec.detach().clone()
    dead = torch.tensor([0, 2, 3, 5])
    chosen = resample.reseed_(sae, optimizer, dead, corners, losses, torch.Generator().manual_seed(0))
    # Only three distinct directions are available, so the fourth dead feature stays as it was.
    assert sorted((chosen // 25).tolist()) == [0, 1, 2]
    assert torch.equal(sae.W_dec[5], before[5])
