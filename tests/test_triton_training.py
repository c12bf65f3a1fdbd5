"""The trainer, and dictionaries used from the CPU, with the Triton kernels: on a GPU if there is one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fakes import FewRows
from test_kernels import random

from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import FrozenSAE
from sae.kernels import choose, device_named
from sae.lm import NativeModel
from sae.training import loop
from sae.training import step as training_step
from sae.training.recipes import resolve

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("topk", {"k": 3, "resample_shares": (0.5,), "dead_tokens": 16}),
        ("towards-monosemanticity", {"l1": 2.0, "resample_shares": (0.5,), "dead_tokens": 16}),
    ],
)
def test_the_trainer_does_with_them_what_it_does_with_the_reference(
    recipe: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    _, config = resolve(recipe, d_sae=24, tokens=64, batch_tokens=16, **settings)
    found = {
        kernels: loop.train(FewRows(), tmp_path / kernels, config, kernels=kernels, device=device)
        for kernels, device in (("triton", DEVICE), ("reference", "cpu"))
    }
    for name, theirs in found["reference"].tensors().items():
        torch.testing.assert_close(found["triton"].tensors()[name].cpu(), theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert found["triton"].config["kernels"] == "triton"
    assert found["triton"].config["device"] == DEVICE


def test_a_run_continues_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = resolve("topk", d_sae=24, tokens=32, batch_tokens=16, k=3, resample_shares=())
    loop.train(FewRows(), tmp_path / "cpu", config, kernels="reference", device="cpu")
    with pytest.raises(ValueError, match="begun on cpu; on cuda the result would differ. Use --device cpu"):
        loop.train(FewRows(), tmp_path / "cpu", config, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here"):
        loop.train(FewRows(), tmp_path / "cuda", config, device="cuda")
    with pytest.raises(ValueError, match="runs on cpu or cuda, not on 'tpu'"):
        device_named("tpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_resumed_run_on_the_gpu_is_the_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = resolve("topk", d_sae=96, tokens=640, batch_tokens=16, k=3, resample_shares=(0.5,), dead_tokens=32)
    whole = loop.train(FewRows(), tmp_path / "whole", config, device="cuda")
    step = loop.Run._step

    def broken(run: loop.Run, *args: Any) -> Any:
        if run.state.step == 25:
            raise KeyboardInterrupt
        return step(run, *args)

    monkeypatch.setattr(loop.Run, "_step", broken)
    with pytest.raises(KeyboardInterrupt):
        loop.train(FewRows(), tmp_path / "broken", config, device="cuda", save_minutes=0.0)
    monkeypatch.setattr(loop.Run, "_step", step)
    again = loop.train(FewRows(), tmp_path / "broken", config, device="cuda")
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_continues_from_rows_on_another_device(tiny_model: NativeModel) -> None:
    downstream = tiny_model.downstream("blocks.0.mlp.hook_post")
    widths = (tiny_model.hook_width(f"blocks.0.{hook}") for hook in ("mlp.hook_post", "hook_resid_mid"))
    x, resid = (random(number, 5, width) for number, width in enumerate(widths))
    there = downstream(x.cuda(), resid.cuda())
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), downstream(x, resid), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"activation": "topk", "k": 3}, {"activation": "relu"}], ids=str)
def test_a_placed_dictionary_answers_on_the_cpu_what_it_would_say_there(settings: dict[str, Any]) -> None:
    sae = SAE(8, 40, **settings).requires_grad_(False)
    for number, parameter in enumerate(sae.parameters()):
        parameter.copy_(random(number, *parameter.shape) * 0.5)
    x = FewRows().sample(20, 0)
    acts, x_hat = FrozenSAE(sae, "cpu", "reference").reconstruct(x)
    found, theirs = FrozenSAE(sae, DEVICE, "triton").reconstruct(x)
    assert x_hat.abs().amax() > 1
    torch.testing.assert_close(theirs, x_hat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.dense(), acts.dense(), rtol=1e-4, atol=1e-5)
    assert FrozenSAE(sae, DEVICE, "triton").encode(x).values.device.type == "cpu"
    with pytest.raises(ValueError, match="no kernels 'fast'"):
        FrozenSAE(sae, "cpu", "fast")


@pytest.fixture(scope="module")
def bench_gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")  # as when the script is run: it imports other scripts
        return importlib.import_module("bench_gpu")


def test_the_gpu_benchmark_says_so_where_there_is_no_gpu(
    bench_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    assert bench_gpu.main() == 2
    assert capsys.readouterr().err == "This benchmark needs a CUDA device, and none is available.\n"


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
        choose_there, start_there = choose, loop.start
        monkeypatch.setattr("sae.kernels.choose", lambda name, device: choose_there(name, "cpu"))
        monkeypatch.setattr("sae.training.state.start", lambda *args: start_there(*args[:-1], "cpu"))
    monkeypatch.setenv("SAE_FIXED_STEP", "0")
    steps: list[Any] = []
    take = training_step.train_step
    monkeypatch.setattr(training_step, "train_step", lambda *args: steps.append(take(*args)))
    batches = [FewRows().sample(16, seed).to(DEVICE) for seed in range(2)]
    for variant in ("topk", "batchtopk"):
        step = bench_gpu.ours("triton", variant, 8, 32, 3, batches)
        step()
        step()
    assert len(steps) == 4
    assert all(metrics["loss"] > 0 for metrics in steps)
