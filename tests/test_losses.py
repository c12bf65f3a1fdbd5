"""Losses and their gradients against the dense formula, written out here in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.kernels import BACKENDS, choose
from sae.kernels.activations import DenseActs
from sae.training import losses
from sae.training.adam import Adam
from sae.training.config import TrainConfig
from sae.training.initialise import kaiming_
from sae.training.recipes import resolve
from sae.training.rows import Batch
from sae.training.sparsity_penalty import LambdaController
from sae.training.state import TrainState
from sae.training.step import train_step

D_IN, D_SAE, BATCH = 6, 20, 50
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def random_sae(activation: str = "relu", k: int | None = None, seed: int = 0) -> SAE:
    """Float64, with biases that are not zero and decoder rows that are not unit."""
    sae = SAE(D_IN, D_SAE, activation=activation, k=k).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.4)
    return sae


def rows(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def dense_topk(pre: Tensor, k: int) -> Tensor:
    kth = pre.sort(-1, descending=True).values[:, k - 1 : k]
    return torch.where(pre >= kth, pre, 0.0).clamp_min(0.0)


def gradients(sae: SAE, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, [getattr(sae, n) for n in NAMES], allow_unused=True)
    return {n: torch.zeros_like(getattr(sae, n)) if g is None else g for n, g in zip(NAMES, found, strict=True)}


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: Any) -> None:
    for name in NAMES:
        torch.testing.assert_close(mine[name], theirs[name], **(tolerance or {"rtol": 1e-10, "atol": 1e-11}), msg=name)


def dense_parts(sae: SAE, x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """pre, f, x̂ as the papers write them, the pre-bias subtracted from x."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = pre.clamp_min(0.0) if k is None else dense_topk(pre, k)
    return pre, f, f @ sae.W_dec + sae.b_dec


def dense_aux(sae: SAE, pre: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """Gao et al.: the dead features with the largest pre-activations explain the error, which is a constant."""
    target = error.detach()
    masked = pre.masked_fill(~dead, -torch.inf)
    k_aux = min(D_IN // 2, int(dead.sum()))
    kth = masked.sort(-1, descending=True).values[:, k_aux - 1 : k_aux]
    f = torch.where(masked >= kth, pre, 0.0).clamp_min(0.0)
    return ((target - f @ sae.W_dec) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()


def test_the_terms_are_sums_over_features_and_means_over_rows() -> None:
    x, x_hat = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [1.0, 0.0]])
    assert losses.squared_error(x, x_hat).item() == (1 + 4 + 1) / 2
    assert losses.l1_norm(DenseActs(torch.tensor([[1.0, 2.0], [0.5, 0.0]]))).item() == 3.5 / 2


def test_relu_and_l1_gradients() -> None:
    sae, x = random_sae(), rows()
    _, f, x_hat = dense_parts(sae, x)
    exact = gradients(sae, ((x - x_hat) ** 2).sum() / BATCH + 0.7 * f.sum() / BATCH)
    for acts in (DenseActs(sae.encode(x)), sae.encode_sparse(x, choose("reference"))):
        x_hat = acts.decode(sae.W_dec) + sae.b_dec
        assert_same(gradients(sae, losses.squared_error(x, x_hat) + 0.7 * losses.l1_norm(acts)), exact)


DEAD = {
    "none": torch.zeros(D_SAE, dtype=torch.bool),
    "one": torch.arange(D_SAE) == 7,
    "some": torch.arange(D_SAE) % 3 == 0,
    "all": torch.ones(D_SAE, dtype=torch.bool),
}


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD.keys())
def test_aux_k_value_and_gradients(dead: Tensor) -> None:
    sae, x = random_sae("topk", 2), rows()
    pre, _, x_hat = dense_parts(sae, x, 2)
    found = losses.aux_k_loss(sae, x, x - x_hat, dead, choose("reference"))
    if not dead.any():
        assert found.item() == 0
        return
    exact = dense_aux(sae, pre, x - x_hat, dead)
    assert found.item() == pytest.approx(exact.item(), rel=1e-12)
    mine = gradients(sae, found)
    assert_same(mine, gradients(sae, exact))
    for name, axis in (("W_enc", 0), ("W_dec", 1)):
        touched = mine[name].abs().sum(axis) > 0
        assert not touched[~dead].any(), f"AuxK must not change {name} of features that are alive"
        assert touched[dead].any(), f"AuxK must change {name} of dead features"
    assert not mine["b_enc"][~dead].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("n_dead", [16, 17, 40, 64])
def test_aux_k_among_many_dead(backend: str, n_dead: int) -> None:
    """d_in 4 has two chosen: sparse among more than 16 dead features, dense among 16; the formula is the same."""
    g = torch.Generator().manual_seed(n_dead)
    sae = SAE(4, 64, activation="topk", k=2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    x, error = torch.randn(2, BATCH, 4, generator=g)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[torch.randperm(64, generator=g)[:n_dead]] = True
    mine = losses.aux_k_loss(sae, x, error, dead, choose(backend))
    target, pre = error.double(), (x.double() - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    masked = pre.masked_fill(~dead, -torch.inf)
    f = torch.where(masked >= masked.sort(-1).values[:, -2:-1], pre, 0.0).clamp_min(0.0)
    exact = ((target - f @ sae.W_dec.double()) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
    assert mine.item() == pytest.approx(exact.item(), rel=1e-5)
    assert_same(gradients(sae, mine), gradients(sae, exact), rtol=1e-4, atol=1e-5)


def test_aux_k_does_not_move_the_reconstruction_it_explains() -> None:
    """The error is detached: no gradient flows through x̂ into features that are alive."""
    sae, x = random_sae("topk", 2), rows()
    error = (x - dense_parts(sae, x, 2)[2]).requires_grad_()
    (flow,) = torch.autograd.grad(
        losses.aux_k_loss(sae, x, error, DEAD["some"], choose("reference")), error, allow_unused=True
    )
    assert flow is None


@pytest.mark.parametrize("error", [torch.zeros(4, D_IN), torch.full((4, D_IN), torch.nan), torch.ones(1, D_IN)])
def test_aux_k_is_zero_when_the_error_has_no_variance(error: Tensor) -> None:
    sae = random_sae("topk", 2)
    x = error.nan_to_num().double()
    assert losses.aux_k_loss(sae, x, error.double(), DEAD["all"], choose("reference")).item() == 0


# --- the whole step --------------------------------------------------------------------------------------------------


def state_of(config: TrainConfig, kernels: str, density: float, seed: int = 0) -> TrainState:
    sae = SAE(D_IN, D_SAE, activation="topk" if config.k else "relu", k=config.k or None)
    x = torch.linspace(-0.2, 0.4, D_IN)[None]
    kaiming_(sae, x, x, replace(config, seed=seed))
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-0.3, 0.3, D_SAE))
    adam = Adam(sae, choose(kernels), beta1=config.beta1)
    tokens = torch.zeros(D_SAE, dtype=torch.int64)
    return TrainState(sae, adam, 0.8, tokens, LambdaController(config, config.l1), density=density)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("k", "dense"), [(0, True), (0, False), (1, False), (4, False)])
@pytest.mark.parametrize("dead", ["none", "some", "all"])
def test_a_step_is_adam_on_the_dense_gradient_with_its_parallel_part_removed(
    k: int, dense: bool, dead: str, kernels: str
) -> None:
    """Two steps by hand in float64: dense loss, projected gradient, Adam's published formula, unit rows."""
    if k:
        recipe, config = resolve("topk", k=k, d_sae=D_SAE, tokens=BATCH * 8, batch_tokens=BATCH, dead_tokens=10**6)
    else:
        recipe, config = resolve("towards-monosemanticity", l1=0.3, d_sae=D_SAE, tokens=BATCH * 8, batch_tokens=BATCH)
    state = state_of(config, kernels, density=1.0)
    twin = SAE(D_IN, D_SAE, activation=recipe.activation, k=k or None).double()
    twin.load_state_dict(state.sae.state_dict())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in twin.named_parameters()}
    for step in range(2):
        raw = rows(seed=step)
        state.tokens_since_fired = torch.where(DEAD[dead], 10**6, 0)
        x = (raw * state.scale).float().double()
        pre, f, x_hat = dense_parts(twin, x, k or None)
        loss = ((x - x_hat) ** 2).sum(-1).mean()
        if not k:
            loss = loss + 0.3 * f.sum(-1).mean()
        elif DEAD[dead].any():
            # relative to the variance of x, as Gao et al. weigh it, in a loss that is not divided by that variance
            variance = ((x - x.mean(0)) ** 2).sum(-1).mean()
            loss = loss + config.aux_coefficient * variance * dense_aux(twin, pre, x - x_hat, DEAD[dead])
        grads = gradients(twin, loss)
        state.density = 1.0 if dense else 0.0
        logged = train_step(state, Batch(raw.float()), config)
        assert logged["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert logged["l0"].item() == pytest.approx((f > 0).sum().item() / BATCH, rel=1e-6)
        rate = config.lr * min(1.0, (step + 1) / (0.02 * 8))
        with torch.no_grad():
            row = twin.W_dec / twin.W_dec.norm(dim=1, keepdim=True)
            grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * row).sum(1, keepdim=True) * row
            for name, parameter in twin.named_parameters():
                m, v = moments[name]
                m.mul_(0.9).add_(grads[name], alpha=0.1)
                v.mul_(0.999).add_(grads[name] ** 2, alpha=0.001)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                parameter -= rate * m_hat / (v_hat.sqrt() + 1e-8)
            twin.W_dec /= twin.W_dec.norm(dim=1, keepdim=True)
        fired = (f > 0).any(0)
        assert (state.tokens_since_fired[fired] == 0).all()
        assert (state.tokens_since_fired[~fired] == torch.where(DEAD[dead], 10**6, 0)[~fired] + BATCH).all()
        for name, parameter in state.sae.named_parameters():
            # where the gradient is rounding noise, Adam's first step is its sign: compare the rest
            sure = moments[name][0].abs() > 1e-5
            torch.testing.assert_close(
                parameter.double()[sure], twin.get_parameter(name)[sure], rtol=2e-4, atol=3e-5, msg=name
            )
        norms = state.sae.W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(D_SAE), rtol=0, atol=1e-6)
        twin.load_state_dict(state.sae.state_dict())  # so that noise does not add up
