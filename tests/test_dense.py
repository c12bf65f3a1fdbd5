"""The dense path: its gradients against float64 autograd, its memory, and the choice of the products in it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import buffers, cpu_screen, dense, matmul, processor
from sae.kernels.activations import DenseActs, l0
from sae.training.losses import l1_norm

D_IN, D_SAE = 24, 70


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves(n_rows: int) -> dict[str, Tensor]:
    found = {
        "x": random(0, n_rows, D_IN),
        "W_enc": random(1, D_SAE, D_IN).t() * 0.3,
        "b_enc": random(2, D_SAE) * 0.2,
        "b_dec": random(3, D_IN) * 0.3,
        "W_dec": random(4, D_SAE, D_IN),
    }
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def loss_of(acts: DenseActs, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return (x - acts.decode(W_dec) - b_dec).pow(2).sum() + 0.7 * l1_norm(acts) + acts.values.pow(3).sum() / 50


@pytest.mark.parametrize("n_rows", [1, 7, dense.ROWS, 2 * dense.ROWS + 5])
@pytest.mark.parametrize("in_place", [True, False])
def test_every_gradient_is_float64_autograds(n_rows: int, in_place: bool) -> None:
    mine = leaves(n_rows)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in mine.items()}
    f = ((wide["x"] - wide["b_dec"]) @ wide["W_enc"] + wide["b_enc"]).relu()
    expected = loss_of(DenseActs(f), wide["x"], wide["W_dec"], wide["b_dec"])
    expected.backward()

    if in_place:  # as the optimiser has it: the gradients exist and are added to
        for tensor in mine.values():
            tensor.grad = torch.ones_like(tensor)
    held = {name: tensor.grad for name, tensor in mine.items()}
    acts = DenseActs(*dense.relu(*(mine[name] for name in ("x", "W_enc", "b_enc", "b_dec"))))
    torch.testing.assert_close(acts.values.double(), f, rtol=1e-5, atol=1e-6)
    assert l0(acts).item() == pytest.approx((f > 0).sum().item() / n_rows)
    assert torch.equal(acts.fired(), (f > 0).any(0))
    loss = loss_of(acts, mine["x"], mine["W_dec"], mine["b_dec"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    for name, tensor in mine.items():
        theirs = wide[name].grad
        found = tensor.grad.double() - (1.0 if in_place else 0.0)
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item(), msg=name)
        assert not in_place or tensor.grad is held[name]


def test_gradients_of_the_activations_alone_and_of_their_sums_alone() -> None:
    for of_sums in (True, False):
        mine = leaves(9)
        f, sums, _ = dense.relu(*(mine[name] for name in ("x", "W_enc", "b_enc", "b_dec")))
        (sums.sum() if of_sums else f.sum()).backward()
        expected = {name: tensor.detach().double().requires_grad_() for name, tensor in mine.items()}
        plain = ((expected["x"] - expected["b_dec"]) @ expected["W_enc"] + expected["b_enc"]).relu()
        plain.sum().backward()
        for name in ("x", "W_enc", "b_enc", "b_dec"):
            torch.testing.assert_close(mine[name].grad.double(), expected[name].grad, rtol=1e-4, atol=1e-5)


def test_frozen_weights_get_no_gradient_and_nan_stays_nan() -> None:
    mine = leaves(5)
    frozen = {name: tensor.detach() for name, tensor in mine.items() if name != "x"}
    f, _, _ = dense.relu(mine["x"], frozen["W_enc"], frozen["b_enc"], frozen["b_dec"])
    dense.decode(f, frozen["W_dec"]).sum().backward()
    assert mine["x"].grad is not None
    assert frozen["W_dec"].grad is None
    spoilt = mine["x"].detach().clone()
    spoilt[2, 3] = torch.nan
    f, sums, _ = dense.relu(spoilt, frozen["W_enc"], frozen["b_enc"], frozen["b_dec"])
    assert f[2].isnan().all()
    assert sums.isnan().all()
    assert f[:2].isfinite().all()


# --- memory ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
@settings(max_examples=30, deadline=None)
def test_memory_is_handed_out_again_only_when_nobody_holds_it(moves: list[tuple[int, bool]]) -> None:
    like = torch.empty(0)
    held: dict[int, Tensor] = {}
    for n, (size, drop) in enumerate(moves):
        tensor = buffers.empty(buffers.POOLED_BYTES // 4 + size, like=like).fill_(n)
        held[n] = tensor[1:].view(1, -1)  # an alias keeps the memory, too
        del tensor
        if drop:
            held.pop(min(held))
        assert all((alias == number).all() for number, alias in held.items())
    assert len({alias.untyped_storage().data_ptr() for alias in held.values()}) == len(held)


def test_memory_is_reused_by_a_tensor_of_another_shape_and_type() -> None:
    first = buffers.empty(512, 1024, like=torch.empty(0))
    at = first.data_ptr()
    second = buffers.empty(512, 1024, like=torch.empty(0))
    assert second.data_ptr() != at
    del first
    third = buffers.empty(1024, 1024, like=torch.empty(0, dtype=torch.bfloat16))
    assert third.data_ptr() == at
    assert third.dtype == torch.bfloat16
    small = buffers.empty(3, 2, like=torch.empty(0, dtype=torch.float64))
    assert small.shape == (3, 2)
    assert small.dtype == torch.float64


# --- products --------------------------------------------------------------------------------------------------------


FLOAT32_ERROR = 2e-6  # relative, of a product over 512 terms; bfloat16's is about 3e-3
ZEN4 = ("avx2", "avx512_f", "avx512_bw", "avx512_bf16")
SAPPHIRE_RAPIDS = (*ZEN4, "amx_tile", "amx_bf16")


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`has(*names)`: the processor's instruction sets from then on."""

    def set_instructions(*names: str) -> None:
        monkeypatch.setattr(matmul, "instructions", lambda: frozenset(names))

    return set_instructions


@pytest.mark.parametrize(
    ("instructions", "products", "reason"),
    [
        (ZEN4, "medium", "this processor has AVX-512 and none of amx_tile"),
        (("avx2", "avx512_f"), "medium", "this processor has AVX-512"),
        (("avx2",), "medium", "the same products as highest"),
        (SAPPHIRE_RAPIDS, "highest", "may round to bfloat16 on this processor: it has amx_tile"),
        (("avx2", "avx_ne_convert"), "highest", "it has avx_ne_convert"),
        (("neon", "bf16", "sve_bf16"), "highest", "it is not an x86 processor with AVX2"),
    ],
)
def test_auto_follows_the_processors_instructions(
    has: Callable[..., None], instructions: tuple[str, ...], products: str, reason: str
) -> None:
    has(*instructions)
    assert matmul.choose("auto") == products
    assert matmul.describe().startswith(f"{products} (")
    assert reason in matmul.describe()
    assert matmul.choose("bf16") == "bf16"
    assert matmul.choose("auto", "cuda") == "highest"
    assert matmul.describe("cuda").startswith("highest (on a GPU")


def test_an_unknown_name_of_products_is_refused() -> None:
    with pytest.raises(ValueError, match="no matrix products 'fast'; choose from auto, highest, medium, bf16"):
        matmul.choose("fast")


def test_no_clock_decides_which_products_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> float:
        raise AssertionError("a clock was read")

    for clock in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
        monkeypatch.setattr(time, clock, read)
    processor.instructions.cache_clear()
    assert matmul.choose("auto") in ("medium", "highest")
    assert cpu_screen.screen_dtype() in (torch.bfloat16, torch.int8, torch.float32)
    assert matmul.describe()


def test_a_resumed_run_keeps_its_products_where_they_are_exact(has: Callable[..., None]) -> None:
    has(*ZEN4)
    assert matmul.resumed("medium", "auto") == "medium"
    has(*SAPPHIRE_RAPIDS)
    assert matmul.resumed("medium", "medium") == "medium"
    assert matmul.resumed("highest", "auto") == "highest"
    with pytest.warns(UserWarning, match=r"may round to bfloat16 .*amx_tile.* It continues with highest"):
        assert matmul.resumed("medium", "auto") == "highest"


@pytest.mark.parametrize("name", ["highest", "auto"])
def test_the_products_chosen_on_this_processor_have_the_error_of_float32(name: str) -> None:
    x, f, W = random(0, 512, 512), random(1, 512, 2048), random(2, 2048, 512)
    exact = torch.cat([x.double() @ W.double().t(), (f.double().t() @ x.double()).t()])
    with matmul.using(matmul.choose(name)):
        found = torch.cat([x @ W.t(), (f.t() @ x).t()])
    assert (found - exact).norm() / exact.norm() <= (1e-6 if name == "highest" else FLOAT32_ERROR)


def test_products_are_switched_inside_and_put_back() -> None:
    a, b = random(0, 300, 200), random(1, 200, 100)
    exact = a.double() @ b.double()

    def error(found: Tensor) -> float:
        return ((found - exact).norm() / exact.norm()).item()

    before = torch.get_float32_matmul_precision()
    out = torch.empty(300, 100)
    with matmul.using("bf16"):
        narrow = error(matmul.product(out, a, b))
        summed = error(matmul.add_product_(torch.ones(300, 100), a, b) - 1)
        with matmul.using("highest"):
            assert error(matmul.product(out, a, b)) < 1e-6
        assert matmul.factor(a).dtype == torch.bfloat16
    assert 1e-3 < narrow < 5e-3
    assert 1e-3 < summed < 5e-3
    assert error(matmul.product(out, a, b)) < 1e-6
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError, match="stop"), matmul.using("medium"):
        raise RuntimeError("stop")
    assert torch.get_float32_matmul_precision() == before
    assert matmul.factor(a) is a


def test_active_entries_are_counted_exactly_beyond_the_whole_numbers_of_float32() -> None:
    """4,097 · 4,099 is odd and above 2^24: float32 cannot hold it."""
    rows, d_sae = 4097, 4099
    acts = DenseActs(*dense.relu(torch.ones(rows, 1), torch.ones(1, d_sae), torch.zeros(d_sae), torch.zeros(1)))
    assert int(acts.n_active()) == int(DenseActs(acts.values).n_active()) == rows * d_sae
