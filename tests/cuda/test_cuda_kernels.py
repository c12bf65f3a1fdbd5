"""The Triton kernels on a GPU against plain torch, and against the rule itself in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae.kernels import choose, reference
from sae.kernels.sparsity import Above, BatchTopK, Rule, Support, TopK


def sizes(device: torch.device) -> tuple[int, int, int]:
    return (700, 512, 8192) if device.type == "cuda" else (6, 8, 24)


def made(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W_enc, bias, W_dec."""
    rows, d_in, d_sae = sizes(device)
    g = torch.Generator().manual_seed(0)
    x, W_enc, W_dec = (torch.randn(*shape, generator=g) for shape in ((rows, d_in), (d_sae, d_in), (d_sae, d_in)))
    return x.to(device), W_enc.to(device).t(), 0.1 * torch.randn(d_sae, generator=g).to(device), W_dec.to(device)


RULES = ["topk", "batch-topk", "lifted", "above"]


def rule_named(name: str, d_sae: int, device: torch.device) -> Rule:
    k = max(2, d_sae // 256)
    lift = torch.linspace(0, 3, d_sae, device=device)
    bar = torch.full((d_sae,), 2.5 * (512 if d_sae > 1000 else 8) ** 0.5, device=device)
    return {"topk": TopK(k), "batch-topk": BatchTopK(k), "lifted": BatchTopK(k, lift), "above": Above(bar)}[name]


@pytest.mark.parametrize("name", RULES)
def test_selection_is_that_of_float32_products(device: torch.device, name: str) -> None:
    """Against float64: no entry that is left out is larger, by more than float32 rounds, than one that is chosen."""
    x, W_enc, bias, _ = made(device)
    kernels, rule = choose("triton", device), rule_named(name, len(bias), device)
    support, values = kernels.select(x, kernels.prepare(W_enc), bias, rule)
    pre = x.double() @ W_enc.double() + bias.double()
    active = torch.zeros_like(pre, dtype=torch.bool)
    active[support.rows, support.features.long()] = True
    torch.testing.assert_close(values.double(), pre[active], rtol=1e-5, atol=1e-4)
    gap = 1e-4
    if isinstance(rule, Above):
        assert not (active & (pre < rule.threshold - gap)).any()
        assert not (~active & (pre > rule.threshold + gap)).any()
        return
    rank = torch.where(pre > 0, pre + (rule.lifts(bias) if isinstance(rule, BatchTopK) else 0), 0.0)
    for span in [slice(None)] if isinstance(rule, BatchTopK) else [slice(n, n + 1) for n in range(len(x))]:
        assert active[span].sum() == rule.k * len(x[span])
        assert rank[span][active[span]].min() >= rank[span][~active[span]].max() - gap


def test_products_on_a_support_are_those_of_plain_torch(device: torch.device) -> None:
    x, W_enc, bias, W_dec = made(device)
    kernels = choose("triton", device)
    support, values = reference.select(x, reference.prepare(W_enc), bias, TopK(max(2, len(bias) // 256)))
    close = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(
        kernels.dots(x, W_dec, support), (x[support.rows] * W_dec[support.features.long()]).sum(-1), **close
    )
    torch.testing.assert_close(kernels.combine(values, support, W_dec), support.dense(values) @ W_dec, **close)
    out, expected = torch.ones_like(W_dec), support.dense(values).t() @ x + 1
    kernels.add_by_feature_(out, values, support, x)
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(kernels.sum_by_feature(values, support), support.dense(values).sum(0), **close)


def test_adam_is_that_of_torch(device: torch.device) -> None:
    _, _, _, W_dec = made(device)
    mine, g = W_dec.clone(), torch.Generator().manual_seed(1)
    theirs = torch.nn.Parameter(W_dec.clone())
    adam = torch.optim.Adam([theirs], lr=1e-2)
    moments = torch.zeros_like(mine), torch.zeros_like(mine)
    for step in range(1, 4):
        gradient = torch.randn(*mine.shape, generator=g).to(device)
        theirs.grad = gradient.clone()
        adam.step()
        how = {"step": step, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "unit_rows": False}
        choose("triton", device).adam_(mine, gradient, *moments, **how)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_the_same_bits_on_every_run(gpu: torch.device) -> None:
    x, W_enc, bias, W_dec = made(gpu)
    kernels = choose("triton", gpu)

    def everything() -> list[Tensor]:
        support, values = kernels.select(x, kernels.prepare(W_enc), bias, TopK(32))
        out = torch.zeros_like(W_dec)
        kernels.add_by_feature_(out, values, support, x)
        return [support.features, values, kernels.combine(values, support, W_dec), kernels.dots(x, W_dec, support), out]

    first = everything()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, everything(), strict=True))


def test_a_row_of_each_kind_is_selected_from(device: torch.device) -> None:
    """Zeros, equal rows, and no positive value."""
    x, W_enc, bias, _ = made(device)
    x[0], x[2], bias = 0.0, x[1], torch.zeros_like(bias)
    kernels = choose("triton", device)
    support, _ = kernels.select(x, kernels.prepare(W_enc), bias, TopK(3))
    counts = support.offsets.diff().tolist()
    assert counts[0] == 0
    assert counts[1] == 3

    def features(row: int) -> Tensor:
        return support.features[support.offsets[row] : support.offsets[row + 1]]

    assert torch.equal(features(1), features(2))
    assert isinstance(support, Support)
