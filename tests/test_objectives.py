"""Each recipe's loss and gradients against the paper's formula, written out here in float64, dense, row by row."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.kernels import choose
from sae.kernels.activations import DenseActs, SparseActs
from sae.kernels.sparsity import Support
from sae.training import losses
from sae.training.config import TrainConfig
from sae.training.objectives import Outcome, ScaledBatch, StepContext
from sae.training.recipes import RECIPES, resolve

D_IN, D_SAE, BATCH, D_OUT, D_VOCAB = 6, 20, 50, 5, 9
LAMBDA = 0.37


def dictionary(name: str, seed: int = 0, k: int | None = None, **shape: Any) -> SAE:
    """Float64, of a recipe's kind, with biases that are not zero and decoder rows that are not unit."""
    recipe = RECIPES[name]
    sae = SAE(D_IN, D_SAE, activation=recipe.activation, k=k, pre_bias=recipe.pre_bias, **shape).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in sae.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=g, dtype=torch.float64) * 0.4)
        if recipe.activation == "jumprelu":
            sae.threshold.abs_()
        if recipe.activation == "batchtopk":
            sae.threshold.fill_(0.2)  # one for all, as in training
    return sae


def rows(width: int = D_IN, seed: int = 1) -> Tensor:
    return torch.randn(BATCH, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def context(config: TrainConfig, *, sparse: bool, dead: Tensor | None = None, **more: Any) -> StepContext:
    nobody = torch.zeros(D_SAE, dtype=torch.bool)
    return StepContext(config, choose("reference"), LAMBDA, sparse, nobody if dead is None else dead, **more)


def settings(name: str, **overrides: Any) -> TrainConfig:
    return resolve(name, d_sae=D_SAE, tokens=BATCH * 8, batch_tokens=BATCH, **overrides)[1]


def check(sae: SAE, outcome: Outcome, exact: Tensor) -> None:
    """The value, and the gradient of every parameter."""
    assert outcome.loss.item() == pytest.approx(exact.item(), rel=1e-12)
    parameters = dict(sae.named_parameters())
    found = torch.autograd.grad(outcome.loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(exact, list(parameters.values()), allow_unused=True, materialize_grads=True)
    for name, mine, theirs in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=name)
    assert any(gradient.abs().max() > 0 for gradient in wanted)


def run(name: str, sae: SAE, batch: ScaledBatch, step: StepContext) -> Outcome:
    outcome = RECIPES[name].objective(sae, batch, step)
    assert isinstance(outcome.acts, SparseActs if step.sparse else DenseActs)
    return outcome


def square(error: Tensor) -> Tensor:
    return sum(row @ row for row in error) / len(error)


sparse_and_dense = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])


@sparse_and_dense
def test_towards_monosemanticity(sparse: bool) -> None:
    sae, x = dictionary("towards-monosemanticity"), rows()
    f = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).clamp_min(0)
    exact = square(x - f @ sae.W_dec - sae.b_dec) + LAMBDA * sum(row.sum() for row in f) / BATCH
    config = settings("towards-monosemanticity")
    check(sae, run("towards-monosemanticity", sae, ScaledBatch(x, x), context(config, sparse=sparse)), exact)


@sparse_and_dense
def test_anthropic_2024_04(sparse: bool) -> None:
    """No pre-bias; each activation weighs with its decoder row's norm, through which gradients flow."""
    sae, x = dictionary("anthropic-2024-04"), rows()
    f = (x @ sae.W_enc + sae.b_enc).clamp_min(0)
    weighted = sum(f[:, i].sum() * sae.W_dec[i].pow(2).sum().sqrt() for i in range(D_SAE)) / BATCH
    exact = square(x - f @ sae.W_dec - sae.b_dec) + LAMBDA * weighted
    config = settings("anthropic-2024-04")
    check(sae, run("anthropic-2024-04", sae, ScaledBatch(x, x), context(config, sparse=sparse)), exact)


@sparse_and_dense
@pytest.mark.parametrize("p", [1.0, 0.6, 0.2])
def test_p_anneal(sparse: bool, p: float) -> None:
    sae, x = dictionary("p-anneal"), rows()
    f = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).clamp_min(0)
    epsilon = losses.LP_EPSILON
    penalty = ((f + epsilon) ** p - epsilon**p).sum() / BATCH
    exact = square(x - f @ sae.W_dec - sae.b_dec) + LAMBDA * penalty
    check(sae, run("p-anneal", sae, ScaledBatch(x, x), context(settings("p-anneal"), sparse=sparse, p=p)), exact)


def test_the_lp_norm_is_the_papers_but_for_its_epsilon() -> None:
    f = DenseActs(torch.tensor([[0.0, 2.0, 5.0]], dtype=torch.float64))
    assert losses.lp_norm(f, 1.0).item() == pytest.approx(7.0)
    assert losses.lp_norm(f, 0.5).item() == pytest.approx(2**0.5 + 5**0.5, rel=0.06)


@sparse_and_dense
def test_gated(sparse: bool) -> None:
    """Eq. 3 to 8 with tied weights W_mag = exp(r_mag) ⊙ W_gate and the decoder a constant in the auxiliary term."""
    sae, x = dictionary("gated"), rows()
    centred = x - sae.b_dec
    pi = centred @ sae.W_enc + sae.b_enc
    magnitude = (centred @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag).clamp_min(0)
    f = (pi > 0).double() * magnitude
    gate = pi.clamp_min(0)
    frozen = gate @ sae.W_dec.detach() + sae.b_dec.detach()
    exact = square(x - f @ sae.W_dec - sae.b_dec) + LAMBDA * gate.sum() / BATCH + square(x - frozen)
    outcome = run("gated", sae, ScaledBatch(x, x), context(settings("gated"), sparse=sparse))
    check(sae, outcome, exact)
    torch.testing.assert_close(outcome.acts.sparse().dense(), f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-9, atol=1e-9)


class Rectangle(torch.autograd.Function):
    """Heaviside with the paper's pseudo-derivative for the threshold (eq. 12)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).double()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        u = (pre - threshold) / ctx.bandwidth
        return None, (-(1 / ctx.bandwidth) * (u.abs() < 0.5).double() * grad).sum(0), None


class Jump(torch.autograd.Function):
    """JumpReLU with the paper's pseudo-derivative for the threshold (eq. 11), and the ordinary one for pre."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        u = (pre - threshold) / ctx.bandwidth
        pseudo = -(threshold / ctx.bandwidth) * (u.abs() < 0.5).double()
        return (pre > threshold) * grad, (pseudo * grad).sum(0), None


@sparse_and_dense
@pytest.mark.parametrize("bandwidth", [0.05, 0.8])
def test_jumprelu(sparse: bool, bandwidth: float) -> None:
    sae, x = dictionary("jumprelu"), rows()
    pre = x @ sae.W_enc + sae.b_enc
    f = Jump.apply(pre, sae.threshold, bandwidth)
    l0 = Rectangle.apply(pre, sae.threshold, bandwidth).sum() / BATCH
    assert ((pre - sae.threshold).abs() < bandwidth / 2).any(0).sum() > 3  # so that thresholds have gradients
    exact = square(x - f @ sae.W_dec - sae.b_dec) + LAMBDA * l0
    config = settings("jumprelu", bandwidth=bandwidth)
    outcome = run("jumprelu", sae, ScaledBatch(x, x), context(config, sparse=sparse))
    check(sae, outcome, exact)
    torch.testing.assert_close(outcome.acts.sparse().dense(), f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-9, atol=1e-9)


def keep_largest(pre: Tensor, k: int) -> Tensor:
    kth = pre.sort(-1, descending=True).values[..., k - 1 : k]
    return torch.where(pre >= kth, pre, 0.0).clamp_min(0)


def keep_largest_of_batch(pre: Tensor, k: int) -> Tensor:
    return keep_largest(pre.flatten()[None], k * len(pre)).view_as(pre)


def aux(sae: SAE, pre: Tensor, x: Tensor, x_hat: Tensor, dead: Tensor) -> Tensor:
    """α · Var(x) · ‖e − ê‖² / ‖e − mean e‖², ê from the largest dead pre-activations, e a constant."""
    error = (x - x_hat).detach()
    f = keep_largest(pre.masked_fill(~dead, -torch.inf), min(D_IN // 2, int(dead.sum())))
    left = ((error - f @ sae.W_dec) ** 2).sum() / ((error - error.mean(0)) ** 2).sum()
    return left / 32 * ((x - x.mean(0)) ** 2).sum() / BATCH


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("multi_k", [0, 4])
def test_multi_topk(k: int, multi_k: int) -> None:
    sae, x = dictionary("topk", k=k), rows()
    dead = torch.arange(D_SAE) % 3 == 0
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    x_hat = keep_largest(pre, k) @ sae.W_dec + sae.b_dec
    exact = square(x - x_hat) + aux(sae, pre, x, x_hat, dead)
    if multi_k:
        exact = exact + square(x - keep_largest(pre, multi_k * k) @ sae.W_dec - sae.b_dec) / 8
    config = settings("topk", k=k, multi_k=multi_k)
    check(sae, run("topk", sae, ScaledBatch(x, x), context(config, sparse=True, dead=dead)), exact)


@pytest.mark.parametrize("k", [1, 3])
def test_batch_topk(k: int) -> None:
    sae, x = dictionary("batch-topk", k=k), rows()
    dead = torch.arange(D_SAE) % 4 == 1
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = keep_largest_of_batch(pre, k)
    assert len({int(n) for n in (f > 0).sum(1)}) > 2  # rows differ in how many they get
    x_hat = f @ sae.W_dec + sae.b_dec
    exact = square(x - x_hat) + aux(sae, pre, x, x_hat, dead)
    check(
        sae,
        run("batch-topk", sae, ScaledBatch(x, x), context(settings("batch-topk", k=k), sparse=True, dead=dead)),
        exact,
    )


def test_balanced() -> None:
    """Entries are ranked by their height above their feature's threshold; the loss is only the squared error."""
    sae, x = dictionary("balanced", k=3), rows()
    with torch.no_grad():
        sae.threshold.copy_(torch.linspace(0, 0.8, D_SAE))
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    above = torch.where(pre > 0, pre - sae.threshold, -torch.inf)
    bar = above.flatten().sort(descending=True).values[3 * len(x) - 1]
    f = torch.where(above >= bar, pre, 0.0)
    assert not torch.equal(f, keep_largest_of_batch(pre, 3))
    step = context(settings("balanced", k=3), sparse=True, dead=torch.ones(D_SAE, dtype=torch.bool))
    check(sae, run("balanced", sae, ScaledBatch(x, x), step), square(x - f @ sae.W_dec - sae.b_dec))


def test_matryoshka() -> None:
    sae, x = dictionary("matryoshka", k=3), rows()
    dead = torch.arange(D_SAE) % 4 == 1
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = keep_largest_of_batch(pre, 3)
    sizes = (2, 5, 12, 20)
    x_hats = [f[:, :m] @ sae.W_dec[:m] + sae.b_dec for m in sizes]
    exact = sum(square(x - x_hat) for x_hat in x_hats) + aux(sae, pre, x, x_hats[-1], dead)
    config = settings("matryoshka", k=3, prefix_shares=tuple(m / D_SAE for m in sizes))
    assert config.prefix_sizes == sizes
    outcome = run("matryoshka", sae, ScaledBatch(x, x), context(config, sparse=True, dead=dead))
    check(sae, outcome, exact)
    assert outcome.error.item() == pytest.approx(square(x - x_hats[-1]).item())


def test_prefixes_are_the_same_dense() -> None:
    values = rows(D_SAE).clamp_min(0)
    sparse = SparseActs(values[values > 0], Support.of(values > 0), choose("reference"))
    for start, stop in ((0, 3), (3, 20), (7, 7)):
        torch.testing.assert_close(sparse.prefix(start, stop).dense(), DenseActs(values).prefix(start, stop).values)
    for k in (1, 4, 20):
        kept = keep_largest(values, k)
        torch.testing.assert_close(sparse.largest_of_rows(k).dense(), kept)
        torch.testing.assert_close(DenseActs(values).largest_of_rows(k).values, kept)


@sparse_and_dense
@pytest.mark.parametrize("skip", [False, True])
def test_transcoder(sparse: bool, skip: bool) -> None:
    sae, x, y = dictionary("transcoder", d_out=D_OUT, skip=skip), rows(), rows(D_OUT, seed=2)
    f = (x @ sae.W_enc + sae.b_enc).clamp_min(0)
    y_hat = f @ sae.W_dec + sae.b_dec + (x @ sae.W_skip if skip else 0)
    exact = square(y - y_hat) + LAMBDA * f.sum() / BATCH
    check(
        sae, run("transcoder", sae, ScaledBatch(x, y), context(settings("transcoder", skip=skip), sparse=sparse)), exact
    )


@sparse_and_dense
@pytest.mark.parametrize("chunk", [512, 7])
def test_end_to_end(sparse: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL through a LayerNorm and an unembedding, the rows in one chunk or in many."""
    monkeypatch.setattr("sae.training.objectives.KL_ROWS", chunk)
    sae, x, resid = dictionary("end-to-end"), rows(), rows(4, seed=3)
    out, unembed = rows(4, seed=4)[:D_IN], rows(D_VOCAB, seed=5)[:4]

    def downstream(at_hook: Tensor, resid: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(resid + at_hook @ out, (4,)) @ unembed

    scale = 1.7
    f = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).clamp_min(0)
    p = downstream(x / scale, resid).softmax(-1)
    q = downstream((f @ sae.W_dec + sae.b_dec) / scale, resid).softmax(-1)
    exact = (p * (p.log() - q.log())).sum() / BATCH + LAMBDA * f.sum() / BATCH
    step = context(settings("end-to-end"), sparse=sparse, scale=scale, downstream=downstream)
    outcome = run("end-to-end", sae, ScaledBatch(x, x, resid), step)
    check(sae, outcome, exact)
    assert outcome.error.item() == pytest.approx(square(x - f @ sae.W_dec - sae.b_dec).item())


def test_every_recipe_has_its_test_here() -> None:
    """But for crosscoder, whose rows have sites: its loss and gradients are tested in test_crosscoder.py."""
    tested = {"towards-monosemanticity", "anthropic-2024-04", "p-anneal", "gated", "jumprelu", "topk", "batch-topk"}
    assert set(RECIPES) == tested | {"balanced", "matryoshka", "transcoder", "end-to-end", "crosscoder"}


def test_no_gradient_reaches_a_feature_that_is_off() -> None:
    """A gated feature with π < 0 for every row gets no gradient, so the sparse path may leave it out."""
    sae, x = dictionary("gated"), rows()
    with torch.no_grad():
        sae.b_enc[3] = -100.0
    outcome = RECIPES["gated"].objective(sae, ScaledBatch(x, x), context(settings("gated"), sparse=True))
    gradient = torch.autograd.grad(outcome.loss, sae.W_enc)[0]
    assert not gradient[:, 3].any()
    assert gradient[:, 4].any()


def test_lambda_zero_and_infinity_are_numbers() -> None:
    sae, x = dictionary("jumprelu"), rows()
    step = replace(context(settings("jumprelu"), sparse=True), coefficient=0.0)
    assert math.isfinite(RECIPES["jumprelu"].objective(sae, ScaledBatch(x, x), step).loss.item())
