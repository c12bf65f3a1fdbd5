"""200 steps on the CPU end at the same parameters as 200 steps of the dense formulas in float64.

The reference below is written from the formulas alone: dense matrices, float64, torch's autograd, Adam by its paper.
Tolerance: logged losses within 1e-5 of their value, parameters within 1e-2 of their norm. Most runs agree to 1e-6 in
both; but float32's rounding may carry an entry across a kink (ReLU, the k-th place), and where that is all of a rare
feature's gradient, Adam's quotient moves this feature by whole steps.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.kernels import autograd, dense
from sae.training import loop
from sae.training.config import TrainConfig
from sae.training.recipes import RECIPES, resolve
from sae.training.rows import Batch

D_IN, D_SAE, BATCH_TOKENS, STEPS = 16, 96, 64, 200
PARAMETER_TOLERANCE, LOSS_TOLERANCE = 1e-2, 1e-5


class MadeUp:
    """Sums of a few of 40 directions, off-centre, in units that training must rescale."""

    d_in = D_IN

    def draw(self, n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        directions = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=torch.Generator().manual_seed(1)))
        active = torch.rand(n, 40, generator=g) < 0.08
        return 3.0 * (active * (0.5 + torch.rand(n, 40, generator=g))) @ directions + 0.7

    def batch(self, step: int) -> Batch:
        return Batch(self.draw(BATCH_TOKENS, 1000 + step))

    def sample(self, n: int, seed: int) -> Tensor:
        return self.draw(min(n, 4096), seed)


def reference(start: dict[str, Tensor], scale: float, rows: MadeUp, config: TrainConfig) -> dict[str, Any]:
    """Dense float64 training: the final parameters, and loss and L0 of every step."""
    p = {name: tensor.double().clone().requires_grad_() for name, tensor in start.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    silent = torch.zeros(D_SAE)
    losses, l0s, n_dead = [], [], []
    for step in range(STEPS):
        x = (rows.batch(step).x * scale).double()
        pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        f = pre.clamp_min(0)
        if config.k:
            kth = pre.sort(-1, descending=True).values[:, config.k - 1 : config.k]
            f = f * (pre >= kth)
        error = x - f @ p["W_dec"] - p["b_dec"]
        loss = (error**2).sum() / BATCH_TOKENS + config.l1 * f.sum() / BATCH_TOKENS
        dead = silent >= config.dead_tokens
        if config.aux_coefficient and dead.any():
            e = error.detach()
            ours = pre[:, dead].clamp_min(0)
            if dead.sum() > D_IN // 2:
                ours = ours * (ours >= ours.sort(-1, descending=True).values[:, D_IN // 2 - 1 : D_IN // 2])
            left = ((e - ours @ p["W_dec"][dead]) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()
            variance = ((x - x.mean(0)) ** 2).sum() / BATCH_TOKENS
            loss = loss + config.aux_coefficient * variance * left
        gradient = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
        warm, fall = config.warmup_share * STEPS, config.decay_share * STEPS
        rate = config.lr * min(1, (step + 1) / warm if warm > step else 1, (STEPS - step) / fall if fall else 1)
        with torch.no_grad():
            rows_of = p["W_dec"]
            gradient["W_dec"] -= (gradient["W_dec"] * rows_of).sum(1, keepdim=True) * rows_of
            for name in p:
                first[name] += 0.1 * (gradient[name] - first[name])
                second[name] += 0.001 * (gradient[name] ** 2 - second[name])
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p[name] -= rate * m / (v.sqrt() + 1e-8)
            p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)
        silent += BATCH_TOKENS
        silent[(f > 0).any(0)] = 0
        losses.append(loss.item())
        n_dead.append(int(dead.sum()))
        l0s.append((f > 0).sum().item() / BATCH_TOKENS)
    return {"parameters": p, "losses": losses, "l0": l0s, "n_dead": n_dead}


def run(
    out: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, **settings: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Tensor], dict[str, int]]:
    """The reference, our log, our final parameters in scaled units, and how many steps were dense or sparse."""
    _, config = resolve(
        recipe, d_sae=D_SAE, tokens=STEPS * BATCH_TOKENS, batch_tokens=BATCH_TOKENS, resample_shares=(), **settings
    )
    start: dict[str, Tensor] = {}
    ways = {"dense": 0, "sparse": 0}
    begin, relu, encode = RECIPES[recipe].initialise, dense.relu, autograd.encode

    def initialised(sae: Any, *args: Any) -> None:
        begin(sae, *args)
        start.update({name: tensor.detach().clone() for name, tensor in sae.named_parameters()})

    def counted(way: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            ways[way] += 1
            return function(*args)

        return call

    monkeypatch.setitem(RECIPES, recipe, replace(RECIPES[recipe], initialise=initialised))
    monkeypatch.setattr(dense, "relu", counted("dense", relu))
    monkeypatch.setattr(autograd, "encode", counted("sparse", encode))
    rows = MadeUp()
    sae = loop.train(rows, out, config, kernels="cpu")
    scale = (D_IN / rows.sample(4096, config.seed).double().pow(2).sum(-1).mean()).sqrt().item()
    mine = {n: t * scale if n.startswith("b_") else t for n, t in sae.tensors().items()}
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return reference(start, scale, rows, config), log, mine, ways


def assert_equal(truth: dict[str, Any], log: list[dict[str, Any]], mine: dict[str, Tensor]) -> None:
    assert [line["step"] for line in log] == list(range(25, STEPS + 1, 25))
    for line in log:
        assert line["loss"] == pytest.approx(truth["losses"][line["step"] - 1], rel=LOSS_TOLERANCE)
        assert line["l0"] == pytest.approx(truth["l0"][line["step"] - 1], abs=2 / BATCH_TOKENS)
    assert mine.keys() == truth["parameters"].keys()
    for name, parameter in truth["parameters"].items():
        assert (mine[name].double() - parameter).norm() <= PARAMETER_TOLERANCE * parameter.norm(), name


@pytest.mark.parametrize("matmul", ["auto", "highest"])
def test_topk_with_aux_k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matmul: str) -> None:
    settings = {"k": 4, "lr": 2e-3, "dead_tokens": 2 * BATCH_TOKENS, "matmul": matmul}
    truth, log, mine, ways = run(tmp_path / "sae", monkeypatch, "topk", **settings)
    assert sum(n > D_IN // 2 for n in truth["n_dead"]) > 20  # so AuxK had to choose among them
    assert sum(0 < n <= D_IN // 2 for n in truth["n_dead"]) > 20
    assert ways == {"dense": 0, "sparse": STEPS}
    assert truth["losses"][-1] < 0.8 * truth["losses"][0]
    assert_equal(truth, log, mine)


@pytest.mark.parametrize("matmul", ["auto", "highest"])
def test_relu_with_l1_across_the_switch_from_dense_to_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matmul: str
) -> None:
    settings = {"l1": 4.0, "lr": 1e-2, "matmul": matmul}
    truth, log, mine, ways = run(tmp_path / "sae", monkeypatch, "towards-monosemanticity", **settings)
    assert ways["dense"] >= 10
    assert ways["sparse"] >= 10
    assert ways["dense"] + ways["sparse"] == STEPS
    assert truth["l0"][0] > 10 * truth["l0"][-1] > 0
    assert_equal(truth, log, mine)
