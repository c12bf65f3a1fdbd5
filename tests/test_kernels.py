"""The sparse operations against the dense formula they stand for, in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import reference as kernels


def parameters(d_in: int, d_sae: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,))
    W_enc, b_enc, W_dec, b_dec = (
        torch.randn(s, generator=g, dtype=torch.float64).mul(0.5).requires_grad_() for s in shapes
    )
    return W_enc, b_enc, W_dec, b_dec


def dense_topk(pre: Tensor, k: int) -> Tensor:
    """Every pre-activation times whether it is one of the row's k largest and positive; a double loop."""
    mask = torch.zeros_like(pre)
    for i, row in enumerate(pre.tolist()):
        for j in sorted(range(len(row)), key=lambda j: -row[j])[:k]:
            mask[i, j] = float(row[j] > 0)
    return pre * mask


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_folding_the_pre_bias_changes_neither_value_nor_gradient(batch: int, d_in: int, d_sae: int, seed: int) -> None:
    W_enc, b_enc, _, b_dec = parameters(d_in, d_sae, seed)
    x = torch.randn(batch, d_in, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(batch, d_sae, dtype=torch.float64)
    wanted = (x - b_dec) @ W_enc + b_enc
    found = kernels.pre_acts(x, W_enc, b_enc, b_dec)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    leaves = (x, W_enc, b_enc, b_dec)
    exact = torch.autograd.grad((wanted * weight).sum(), leaves)
    for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), leaves), exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("bias", [-3.0, 0.0, 3.0])  # hardly anything positive; about half; nearly all
def test_sparse_decode_of_topk_is_the_dense_product_with_all_its_gradients(k: int, bias: float) -> None:
    W_enc, b_enc, W_dec, b_dec = parameters(5, 12, seed=k)
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = (W_enc, b_enc, W_dec, b_dec)

    def loss(x_hat: Tensor) -> Tensor:
        return ((x - x_hat) ** 2).sum(-1).mean()

    pre = (x - b_dec) @ W_enc + b_enc + bias
    exact = loss(dense_topk(pre, k) @ W_dec + b_dec)
    values, indices = kernels.topk(kernels.pre_acts(x, W_enc, b_enc + bias, b_dec), k)
    found = loss(kernels.sparse_decode(values, indices, W_dec) + b_dec)
    assert found.item() == pytest.approx(exact.item(), rel=1e-12)
    theirs = torch.autograd.grad(exact, leaves)
    for name, mine, their in zip(
        ("W_enc", "b_enc", "W_dec", "b_dec"), torch.autograd.grad(found, leaves), theirs, strict=True
    ):
        torch.testing.assert_close(mine, their, rtol=1e-10, atol=1e-11, msg=name)
    assert all(grad.abs().sum() > 0 for grad in theirs)


@given(st.integers(1, 6), st.integers(1, 15), st.data())
@settings(max_examples=40, deadline=None)
def test_topk_keeps_the_largest_positive_and_scatter_puts_them_in_place(batch: int, d_sae: int, data: st.DataObject):
    k = data.draw(st.integers(1, d_sae))
    values = st.floats(-5, 5, allow_nan=False, width=32)
    pre = torch.tensor(data.draw(st.lists(st.lists(values, min_size=d_sae, max_size=d_sae, unique=True),
                                          min_size=batch, max_size=batch)))  # fmt: skip
    kept, indices = kernels.topk(pre, k)
    assert kept.shape == indices.shape == (batch, k)
    torch.testing.assert_close(kernels.scatter(kept, indices, d_sae), dense_topk(pre, k), rtol=0, atol=0)


def test_scatter_is_differentiable() -> None:
    values = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 5], [3, 1], [2, 4], [5, 0]])
    weight = torch.randn(4, 6, dtype=torch.float64)
    (kernels.scatter(values, indices, 6) * weight).sum().backward()
    torch.testing.assert_close(values.grad, weight.gather(1, indices))
