"""Tests for the Triton kernels only; test_kernels tests what all backends have in common.

Without a GPU they run in Triton's interpreter, and are compiled for two GPUs to see that they can be.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_kernels import active_by_rule, random, weights
from torch import Tensor

from sae.kernels import choose
from sae.kernels.sparsity import Above, BatchTopK, NotSparse, Rule, Support, TopK

pytest.importorskip("triton")
from sae.kernels import triton_screen, triton_select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = choose("triton", DEVICE)
ROOT = Path(__file__).resolve().parent.parent


def selected(x: Tensor, W_enc: Tensor, bias: Tensor, rule: Rule) -> tuple[Support, Tensor]:
    return KERNELS.select(x, KERNELS.prepare(W_enc), bias, rule)


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def test_every_kernel_compiles_for_an_a100_and_an_h100(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_triton.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {"sm_80", "sm_90"}
    assert {line.split()[1] for line in lines} >= {"_screen", "_dots", "_sum_rows", "_adam_unit_rows"}
    assert all(int(line.split()[2]) > 1000 for line in lines)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30], ids=str)
def test_narrowed_rows_say_how_far_off_they_are(scale: float) -> None:
    rows = random(0, 9, 50) * 10.0 ** random(1, 9, 1) * scale
    rows[3] = 0
    rows[4] = torch.tensor(scale)
    narrow = triton_screen.narrowed(rows)
    exact, back = rows.double(), narrow.numbers.double() * narrow.scale.double()[:, None]
    error = (exact - back).norm(dim=-1)
    torch.testing.assert_close(narrow.error.double(), error, rtol=1e-4, atol=1e-37)  # float32's smallest
    assert (narrow.norm.double() * (1 + 1e-5) >= torch.maximum(exact.norm(dim=-1), back.norm(dim=-1))).all()
    assert (error <= 2.0**-11 * exact.norm(dim=-1)).all()
    assert narrow.numbers.abs().amax() < 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns
def test_what_is_not_finite_is_not_for_the_sparse_path() -> None:
    W_enc, bias, _ = weights(8, 40)
    for bad in (torch.nan, torch.inf):
        x = random(3, 5, 8)
        x[2, 1] = bad
        for rule in (TopK(3), Above(torch.zeros(40))):
            with pytest.raises(NotSparse, match="not finite"):
                selected(x, W_enc, bias, rule)
    with pytest.raises(NotSparse, match="not finite"):
        selected(random(3, 5, 8), W_enc, bias * torch.nan, TopK(3))


def test_the_screen_in_float16_changes_nothing() -> None:
    """Values so close to each other that float16 cannot distinguish them; the float32 product can."""
    d_in, d_sae, rows = 64, 200, 10
    shared = random(0, 1, d_in)
    W_enc = (shared + 1e-4 * random(1, d_sae, d_in)).t()
    x = shared.sign() + 1e-5 * random(2, rows, d_in)
    bias = torch.linspace(-1e-4, 1e-4, d_sae)
    pre = x.double() @ W_enc.double() + bias.double()
    assert len(torch.unique((x.half() @ W_enc.half())[0])) < 20  # so the screen alone could not decide
    rules: list[Rule] = [TopK(7), BatchTopK(7), Above(pre.quantile(0.98).float().expand(d_sae).contiguous())]
    for rule in rules:
        support, values = selected(x, W_enc, bias, rule)
        assert_chosen(pre, rule, support, values)


def assert_chosen(pre: Tensor, rule: Rule, support: Support, values: Tensor) -> None:
    """As the float64 product decides, except where float32's rounding may decide otherwise."""
    dense, active, gap = support.dense(values), active_by_rule(pre, rule), 2e-6 * pre.abs().max()
    smallest = torch.where(active, pre, torch.inf)
    bar = smallest.amin(-1, keepdim=True) if isinstance(rule, TopK) else smallest.amin()
    wrong = active != (dense != 0)
    assert ((pre - bar)[wrong].abs() < gap).all()
    assert wrong.float().mean() < 0.01
    torch.testing.assert_close(dense.double()[~wrong], torch.where(active, pre, 0.0)[~wrong], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "rows", "numbers"), [(1, 20, 10**6), (5, 140, 1), (60, 20, 10**6), (140, 8, 10**6)])
def test_topk_does_not_depend_on_how_the_screen_is_cut(
    monkeypatch: pytest.MonkeyPatch, k: int, rows: int, numbers: int
) -> None:
    """k = 5 in two pieces of rows; k = 60 and 140 with fewer whole groups than k, so that the groups shrink."""
    monkeypatch.setattr(triton_select, "KEPT_NUMBERS", numbers)
    W_enc, bias, _ = weights(33, 150)
    x = random(4, rows, 33)
    support, values = selected(x, W_enc, bias, TopK(k))
    assert_chosen(x.double() @ W_enc.double() + bias.double(), TopK(k), support, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    a, b = random(0, 12, 20).to(dtype), random(1, 30, 20).to(dtype)
    active = random(2, 12, 30) > 1
    support = Support.of(active)
    values = random(3, len(support.features))
    found = KERNELS.dots(a, b, support)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (a.double() @ b.double().T)[active], rtol=1e-5, atol=1e-5)
    x_hat = KERNELS.combine(values, support, b)
    assert x_hat.dtype == torch.float32
    torch.testing.assert_close(x_hat.double(), support.dense(values).double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_only_the_rows_of_active_features_are_written() -> None:
    support = Support(torch.tensor([3, 3], dtype=torch.int32), torch.tensor([0, 1, 2]), 6)
    out = torch.full((6, 4), torch.nan)
    out[3] = 0.0
    KERNELS.add_by_feature_(out, torch.tensor([2.0, -1.0]), support, random(0, 2, 4))
    assert out[3].isfinite().all()
    assert out[[0, 1, 2, 4, 5]].isnan().all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_bits_on_every_run() -> None:
    W_enc, bias, W_dec = weights(256, 4096)
    x = random(5, 2000, 256)

    def everything() -> list[Tensor]:
        support, values = selected(x, W_enc, bias, TopK(32))
        out = torch.zeros(4096, 256)
        KERNELS.add_by_feature_(out, values, support, x)
        return [support.features, values, KERNELS.combine(values, support, W_dec), KERNELS.dots(x, W_dec, support), out]

    first = everything()
    for _ in range(3):
        for one, other in zip(first, everything(), strict=True):
            assert torch.equal(one, other)
