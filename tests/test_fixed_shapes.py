"""A fixed-shape step at real size on tensors without data: whatever needs a number or a size from the device fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sae.dictionary.autoencoder import SAE
from sae.dictionary.sites import Site
from sae.kernels import choose
from sae.training.adam import Adam
from sae.training.config import TrainConfig
from sae.training.fixed_plan import can_be_fixed, plan_for
from sae.training.fixed_steps import FixedSteps
from sae.training.recipes import RECIPES, resolve
from sae.training.rows import Batch
from sae.training.sparsity_penalty import LambdaController
from sae.training.state import TrainState
from sae.training.step import train_step

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="watches launches in Triton's interpreter")

D_IN, D_SAE, ROWS, STEPS = 512, 16_384, 4096, 3
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)


def config_of(name: str, **settings: Any) -> TrainConfig:
    return resolve(name, d_sae=D_SAE, tokens=ROWS * 1000, batch_tokens=ROWS, **settings)[1]


FIXED = [
    (name, precision)
    for name, recipe in RECIPES.items()
    for precision in ("float32", "bf16")
    if can_be_fixed(recipe, config_of(name, precision=precision))
]


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Tensors have shapes only; what Triton is asked to launch is noted and not done."""
    from triton.runtime.interpreter import GridExecutor

    launched: list[Any] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **options: launched.append((args, options)))
    with FakeTensorMode():
        yield launched


def begun(name: str, config: TrainConfig, density: float = 0.001) -> TrainState:
    """A run as it might be in its middle: nothing about it is read from data."""
    recipe, kernels = RECIPES[name], choose("triton", "cpu")
    sae = SAE(D_IN, D_SAE, activation=recipe.activation, k=config.k or None, pre_bias=recipe.pre_bias, skip=config.skip)
    adam = Adam(sae, kernels, beta1=config.beta1, unit_norm=recipe.unit_norm)
    penalty = LambdaController.start(config, getattr(config, recipe.coefficient) if recipe.coefficient else 0.0)
    state = TrainState(sae, adam, 1.5, torch.zeros(D_SAE, dtype=torch.int64), penalty, density=density)
    if recipe.needs == "resid":
        state.downstream = lambda x, resid: x + resid
    if recipe.needs == "sites":
        state.sites = (Site("a", D_IN // 2, 1.0), Site("b", D_IN // 2, 1.0))
    state.fixed_plan = plan_for(recipe, config, torch.device("cuda"), "triton")
    return state


def _has_dense_steps(name: str) -> bool:
    return bool(RECIPES[name].coefficient and not RECIPES[name].needs)


DENSITIES = [(*case, 0.001) for case in FIXED] + [(*case, 0.5) for case in FIXED if _has_dense_steps(case[0])]


@pytest.mark.parametrize(("name", "precision", "density"), DENSITIES)
def test_no_shape_depends_on_data(without_data: list[Any], name: str, precision: str, density: float) -> None:
    config = config_of(name, precision=precision)
    fixed = FixedSteps(begun(name, config, density), config, lambda step: step.run)
    counts = []
    for _ in range(STEPS):
        fixed.take(Batch(*(torch.zeros(ROWS, D_IN) for _ in range(3))))
        counts.append(len(without_data))
    assert counts[0] > 8 or density == 0.5
    assert [after - before for before, after in zip([0, *counts], counts, strict=False)] == [counts[0]] * STEPS
    first, last = (without_data[-n * counts[0] : len(without_data) - (n - 1) * counts[0]] for n in (STEPS, 1))
    assert [_shapes(launch) for launch in first] == [_shapes(launch) for launch in last]
    assert fixed.state.step == STEPS


def _shapes(launch: Any) -> list[Any]:
    args, options = launch
    return [tuple(arg.shape) if isinstance(arg, torch.Tensor) else arg for arg in (*args, *options.values())]


def test_a_size_or_a_number_from_the_data_is_noticed(without_data: list[Any]) -> None:
    """The check can fail: on what it looks for, and on the general step."""
    with pytest.raises(UNKNOWN):
        torch.zeros(8).nonzero()
    with pytest.raises(UNKNOWN):
        torch.zeros(8).sum().item()
    config = config_of("topk")
    with pytest.raises(UNKNOWN):
        train_step(begun("topk", config), Batch(torch.zeros(ROWS, D_IN)), config)


def test_the_recipes_that_are_written_in_fixed_shapes_are_looked_at() -> None:
    assert {name for name, precision in FIXED if precision == "bf16"} == {name for name, _ in FIXED}
    assert {name for name, _ in FIXED} == set(RECIPES)
