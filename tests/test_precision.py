"""Selection straight from a bfloat16 product: what it chooses, and how a run asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FewRows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.cli import main
from sae.kernels import reference
from sae.kernels.bfloat16 import largest, selecting_in
from sae.kernels.sparsity import Above, BatchTopK, Rule, TopK
from sae.training import loop
from sae.training.config import TrainConfig
from sae.training.recipes import resolve


def rounded(x: np.ndarray) -> np.ndarray:
    """Float64 numbers at the nearest number with 8 significant bits; ties go to the even one."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 256), exponent - 8)  # numpy's round is to even


def chosen(pre: np.ndarray, rule: Rule) -> np.ndarray:
    """The rule by brute force: entries by falling value, of equal ones the first, as many as there may be."""
    if isinstance(rule, Above):
        return pre > rule.threshold.double().numpy()
    active, rows = np.zeros(pre.shape, bool), [[n] for n in range(len(pre))]
    rank = pre
    if isinstance(rule, BatchTopK):
        rows = [list(range(len(pre)))]
        rank = np.where(pre > 0, pre + rule.lifts(torch.zeros(pre.shape[1])).double().numpy(), 0)
    for group in rows:
        entries = sorted((-rank[row, i], row, i) for row in group for i in range(pre.shape[1]) if rank[row, i] > 0)
        for _, row, i in entries[: rule.k * len(group)]:
            active[row, i] = True
    return active


RULES: list[Rule] = [
    TopK(3),
    TopK(40),
    BatchTopK(3),
    BatchTopK(2, torch.arange(150.0).roll(7)),
    Above(torch.zeros(150)),
    Above(torch.arange(150.0)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_features_are_those_of_the_rounded_product(rule: Rule) -> None:
    """Whole numbers, whose products and sums float32 holds exactly: then rounded to 8 bits, where many are equal."""
    rng = np.random.default_rng(2)
    x, W, b = (rng.integers(-20, 21, shape).astype(np.float64) for shape in ((9, 16), (16, 150), (150,)))
    pre = rounded(x @ W + b)
    assert len(np.unique(pre)) < 0.7 * pre.size
    kernels = selecting_in("bf16", reference)
    factors = [torch.tensor(each, dtype=torch.float32) for each in (x, W, b)]
    support, values = kernels.select(factors[0], kernels.prepare(factors[1]), factors[2], rule)
    active = chosen(pre, rule)
    assert np.array_equal(support.rows, np.nonzero(active)[0])
    assert np.array_equal(support.features, np.nonzero(active)[1])
    assert np.array_equal(values.double(), pre[active])


def test_factors_are_rounded_too() -> None:
    x, W = torch.tensor([[1 + 2.0**-9]]), torch.tensor([[1.0, 1 + 2.0**-9, 1 + 2.0**-7]])
    _, values = selecting_in("bf16", reference).select(x, reference.prepare(W), torch.zeros(3), TopK(3))
    assert values.tolist() == [1.0, 1.0, 1 + 2.0**-7]
    _, exact = selecting_in("float32", reference).select(x, reference.prepare(W), torch.zeros(3), TopK(3))
    assert exact.tolist() != values.tolist()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(-2, 3), min_size=5, max_size=5), min_size=1, max_size=4), k=st.integers(1, 7)
)
def test_of_equal_values_the_first_are_the_largest(values: list[list[int]], k: int) -> None:
    found = largest(torch.tensor(values, dtype=torch.float32), k)
    for row, active in zip(values, found.tolist(), strict=True):
        order = sorted((n for n in range(5) if row[n] > 0), key=lambda n: (-row[n], n))
        assert [n for n in range(5) if active[n]] == sorted(order[:k])


# --- in a run --------------------------------------------------------------------------------------------------------


def config_of(**more: Any) -> TrainConfig:
    return resolve("topk", d_sae=24, tokens=8 * 16, batch_tokens=16, k=3, dead_tokens=48, **more)[1]


def trained(out: Path, **more: Any) -> dict[str, Tensor]:
    return loop.train(FewRows(), out, config_of(**more), device="cpu", kernels="reference").tensors()


def test_a_run_selects_as_it_was_asked_to_and_says_so(tmp_path: Path) -> None:
    plain, asked, narrow = (
        trained(tmp_path / name, **more)
        for name, more in (("plain", {}), ("float32", {"precision": "float32"}), ("bf16", {"precision": "bf16"}))
    )
    assert all(torch.equal(tensor, asked[name]) for name, tensor in plain.items())
    assert not torch.equal(plain["W_dec"], narrow["W_dec"])
    for name, (precision, products) in {"plain": ("float32", None), "bf16": ("bf16", "bf16")}.items():
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["train"]["precision"] == precision
        assert products in (None, config["matmul"])
    assert config_of(precision="bf16", matmul="highest").products == "highest"
    with pytest.raises(ValueError, match="precision must be one of float32, bf16, got 'fp8'"):
        config_of(precision="fp8")


def test_a_run_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole", precision="bf16")
    advance = loop.Run.advance

    def broken(run: loop.Run, *args: Any) -> str:
        if run.state.step == 5:
            raise KeyboardInterrupt
        return advance(run, *args)

    monkeypatch.setattr(loop.Run, "advance", broken)
    with pytest.raises(KeyboardInterrupt):
        loop.train(FewRows(), tmp_path / "broken", config_of(precision="bf16"), kernels="reference", save_minutes=0.0)
    monkeypatch.setattr(loop.Run, "advance", advance)
    again = trained(tmp_path / "broken", precision="bf16")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_the_command_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("sae.pipeline.train", lambda *_, config, **__: asked.append(config))
    for flags in ([], ["--precision", "bf16"], ["--set", "precision=bf16"]):
        assert main(["train", "--acts", "a", "--out", "b", *flags]) == 0
    assert asked == [{}, {"precision": "bf16"}, {"precision": "bf16"}]
