"""What only the Triton kernels promise; that they do what every backend does is in test_kernels.

Without a GPU they run in Triton's interpreter, and are compiled for two GPUs to see that they can be.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_kernels import active_by_rule, random, weights
from torch import Tensor

from sae import training
from sae.kernels import choose, device_named
from sae.kernels.support import Above, BatchTopK, NotSparse, Rule, Support, TopK
from sae.lm import NativeModel
from sae.model import SAE
from sae.placed import Placed
from sae.recipes import resolve
from sae.rows import Batch

pytest.importorskip("triton")
from sae.kernels import triton_screen, triton_select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = choose("triton", DEVICE)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def test_every_kernel_compiles_for_an_a100_and_an_h100(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
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
                KERNELS.select(x, W_enc, bias, rule)
    with pytest.raises(NotSparse, match="not finite"):
        KERNELS.select(random(3, 5, 8), W_enc, bias * torch.nan, TopK(3))


def test_the_screen_in_float16_changes_nothing() -> None:
    """Values so close to each other that float16 cannot tell them apart; the float32 product can."""
    d_in, d_sae, rows = 64, 200, 10
    shared = random(0, 1, d_in)
    W_enc = (shared + 1e-4 * random(1, d_sae, d_in)).t()
    x = shared.sign() + 1e-5 * random(2, rows, d_in)
    bias = torch.linspace(-1e-4, 1e-4, d_sae)
    pre = x.double() @ W_enc.double() + bias.double()
    assert len(torch.unique((x.half() @ W_enc.half())[0])) < 20  # so the screen alone could not decide
    rules: list[Rule] = [TopK(7), BatchTopK(7), Above(pre.quantile(0.98).float().expand(d_sae).contiguous())]
    for rule in rules:
        support, values = KERNELS.select(x, W_enc, bias, rule)
        assert_chosen(pre, rule, support, values)


def assert_chosen(pre: Tensor, rule: Rule, support: Support, values: Tensor) -> None:
    """As the float64 product decides, but where float32's own rounding may."""
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
    support, values = KERNELS.select(x, W_enc, bias, TopK(k))
    assert_chosen(x.double() @ W_enc.double() + bias.double(), TopK(k), support, values)


def test_huge_biases_do_not_hide_what_is_active() -> None:
    """x · w + bias is small while both are large: what float32 leaves of it decides."""
    W_enc, _, _ = weights(33, 150)
    x = random(4, 20, 33)
    product = x.double() @ W_enc.double()
    bias = -(product[0] * 1.0).float()
    W_large, bias_large = W_enc * 1024.0, bias * 1024.0
    for threshold in (torch.zeros(150), bias_large.abs()):
        support, values = KERNELS.select(x, W_large, bias_large, Above(threshold))
        pre = product * 1024.0 + bias_large.double()
        active = support.dense(torch.ones_like(values)) > 0
        sure = (pre - threshold).abs() > 1e-6 * (product.abs() * 1024.0 + bias_large.abs() + threshold)
        assert torch.equal(active[sure], (pre > threshold)[sure])


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
        support, values = KERNELS.select(x, W_enc, bias, TopK(32))
        out = torch.zeros(4096, 256)
        KERNELS.add_by_feature_(out, values, support, x)
        return [support.features, values, KERNELS.combine(values, support, W_dec), KERNELS.dots(x, W_dec, support), out]

    first = everything()
    for _ in range(3):
        for one, other in zip(first, everything(), strict=True):
            assert torch.equal(one, other)


class FewRows:
    """Made-up rows near a few directions, the same on every call."""

    d_in = 8

    def batch(self, step: int) -> Batch:
        return Batch(self.sample(16, step))

    def sample(self, n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, 8, generator=g, device="cpu")
        return noise + 3 * torch.eye(8, device="cpu")[torch.randint(8, (n,), generator=g, device="cpu")]


@pytest.mark.parametrize(("recipe", "settings"), [
    ("topk", {"k": 3, "resample_shares": (0.5,), "dead_tokens": 16}),
    ("towards-monosemanticity", {"l1": 2.0, "resample_shares": (0.5,), "dead_tokens": 16}),
])  # fmt: skip
def test_the_trainer_does_with_them_what_it_does_with_the_reference(
    recipe: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    _, config = resolve(recipe, d_sae=24, tokens=64, batch_tokens=16, **settings)
    found = {
        kernels: training.train(FewRows(), tmp_path / kernels, config, kernels=kernels, device=device)
        for kernels, device in (("triton", DEVICE), ("reference", "cpu"))
    }
    for name, theirs in found["reference"].tensors().items():
        torch.testing.assert_close(found["triton"].tensors()[name].cpu(), theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert found["triton"].config["kernels"] == "triton"
    assert found["triton"].config["device"] == DEVICE


def test_a_run_goes_on_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = resolve("topk", d_sae=24, tokens=32, batch_tokens=16, k=3, resample_shares=())
    training.train(FewRows(), tmp_path / "cpu", config, kernels="reference", device="cpu")
    with pytest.raises(ValueError, match="begun on cpu; on cuda it would not go on bit for bit. Say --device cpu"):
        training.train(FewRows(), tmp_path / "cpu", config, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here"):
        training.train(FewRows(), tmp_path / "cuda", config, device="cuda")
    with pytest.raises(ValueError, match="runs on cpu or cuda, not on 'tpu'"):
        device_named("tpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_resumed_run_on_the_gpu_is_the_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = resolve("topk", d_sae=96, tokens=640, batch_tokens=16, k=3, resample_shares=(0.5,), dead_tokens=32)
    whole = training.train(FewRows(), tmp_path / "whole", config, device="cuda")
    step = training.train_step

    def broken(state: training.TrainState, *args: Any) -> Any:
        if state.step == 25:
            raise KeyboardInterrupt
        return step(state, *args)

    monkeypatch.setattr(training, "train_step", broken)
    with pytest.raises(KeyboardInterrupt):
        training.train(FewRows(), tmp_path / "broken", config, device="cuda", save_minutes=0.0)
    monkeypatch.setattr(training, "train_step", step)
    again = training.train(FewRows(), tmp_path / "broken", config, device="cuda")
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_goes_on_from_rows_on_another_device(tiny_model: NativeModel) -> None:
    downstream = tiny_model.downstream("blocks.0.mlp.hook_post")
    widths = (tiny_model.hook_width(f"blocks.0.{hook}") for hook in ("mlp.hook_post", "hook_resid_mid"))
    x, resid = (random(number, 5, width) for number, width in enumerate(widths))
    there = downstream(x.cuda(), resid.cuda())
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), downstream(x.cpu(), resid.cpu()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"activation": "topk", "k": 3}, {"activation": "relu"}], ids=str)
def test_a_placed_dictionary_answers_on_the_cpu_what_it_would_say_there(settings: dict[str, Any]) -> None:
    with torch.device("cpu"):
        sae = SAE(8, 40, **settings).requires_grad_(False)
        for number, parameter in enumerate(sae.parameters()):
            parameter.copy_(random(number, *parameter.shape) * 0.5)
        x = FewRows().sample(20, 0)
        acts, x_hat = Placed(sae, "cpu", "reference").reconstruct(x)
        found, theirs = Placed(sae, DEVICE, "triton").reconstruct(x)
        assert x_hat.abs().amax() > 1
        torch.testing.assert_close(theirs, x_hat, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.dense(), acts.dense(), rtol=1e-4, atol=1e-5)
        assert Placed(sae, DEVICE, "triton").encode(x).values.device.type == "cpu"
        with pytest.raises(ValueError, match="no kernels 'fast'"):
            Placed(sae, "cpu", "fast")


@pytest.fixture(scope="module")
def bench_gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "scripts" / "bench_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_benchmark_says_so_where_there_is_no_gpu(
    bench_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    assert bench_gpu.main() == 2
    assert capsys.readouterr().err == "There is no CUDA device here, and this benchmark needs one.\n"


def test_the_roofline_is_the_slower_of_bytes_and_operations(bench_gpu: ModuleType) -> None:
    """Per input dimension: 9 numbers for each of 2 · 8 weights, 8 for the product, 2 · 6 active, 3 · 3 of the batch."""
    bound = bench_gpu.roofline(10, 8, 2, 3, bytes_per_s=1e3, operations_per_s=1e9)
    assert bound["bytes"] == 4 * 10 * (9 * 16 + 8 + 12 + 9)
    assert bound["operations"] == 2 * 3 * 10 * 8
    assert bound["seconds"] == bound["bytes"] / 1e3
    assert bench_gpu.roofline(10, 8, 2, 3, 1e12, 1.0)["seconds"] == 480.0
    assert bench_gpu.dense_operations(10, 8, 3) == 5 * 480


def test_the_gpu_benchmarks_contender_takes_real_steps(bench_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # what it asks of a GPU, here in the interpreter
        choose_there, start_there = choose, training.start
        monkeypatch.setattr("sae.kernels.choose", lambda name, device: choose_there(name, "cpu"))
        monkeypatch.setattr(training, "start", lambda *args: start_there(*args[:-1], "cpu"))
    steps: list[Any] = []
    take = training.train_step
    monkeypatch.setattr(training, "train_step", lambda *args: steps.append(take(*args)))
    batches = [FewRows().sample(16, seed).to(DEVICE) for seed in range(2)]
    for variant in ("topk", "batchtopk"):
        step = bench_gpu.ours("triton", variant, 8, 32, 3, batches)
        step()
        step()
    assert len(steps) == 4
    assert all(metrics["loss"] > 0 for metrics in steps)
