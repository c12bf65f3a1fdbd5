"""The step with dense products that can be captured, against the general one, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_fixed_step import RECIPES, Rows, assert_twins, begun, fixed_anywhere, tensors  # noqa: F401

from sae.kernels.triton_step import NOT_FINITE, SPARSE
from sae.training import fixed_steps, step
from sae.training.dense_step import DenseStep
from sae.training.fixed_steps import FixedSteps
from sae.training.recipes import recipe_named
from sae.training.rows import Batch
from sae.training.step import train_step

PENALISED = {name: case for name, case in RECIPES.items() if "k" not in case[1] and not recipe_named(case[0]).needs}


@pytest.mark.parametrize("name", PENALISED)
def test_a_dense_step_does_what_the_general_step_does(name: str) -> None:
    """From the first step of a run on, where about half of the features are active."""
    recipe, settings = PENALISED[name]
    rows = Rows(12, 8)
    (one, config), (other, _) = (begun(recipe, rows, 40, **settings) for _ in range(2))
    for state in (one, other):
        state.step = state.optimizer.step_count = state.penalty.step = 10  # λ is searched for, and p falls
        state.tokens_since_fired[::3] = 1000  # long enough for biases of jumprelu to rise
    fixed = FixedSteps(other, config)
    for number in range(3):
        expected = train_step(one, rows.batch(number), config)
        fixed.take(rows.batch(number))
        found = fixed.settle()
        assert isinstance(fixed.made, DenseStep)
        assert not fixed.made.buffers.flags.any()
        assert_twins(one, other)
        for figure in ("loss", "error", "l0", "x"):
            torch.testing.assert_close(found[figure], expected[figure], rtol=1e-5, atol=0)
    assert other.density > 1 / 20
    assert all(moment.any() for moment in other.optimizer.tensors().values())


@pytest.mark.parametrize("every", [1, 6])
def test_a_run_becomes_sparse_and_dense_again_however_late_that_is_noticed(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases decide, which a high λ lowers and, from a step on, a low one lets rise: both borders are crossed."""
    rows, settings = Rows(12, 8), {"l1": 2.0, "resample_shares": ()}
    one, config = begun("towards-monosemanticity", rows, 40, **settings)
    other, _ = begun("towards-monosemanticity", rows, 40, **settings)
    l0s = [float(train_step(one, rows.batch(number), config)["l0"]) for number in range(6)]
    border = sorted(l0s[:-1])[2] / 40 + 1e-6  # half of the steps are on either side of it
    monkeypatch.setattr(step, "SPARSE_BELOW_DENSITY", border)
    monkeypatch.setattr(fixed_steps, "SPARSE_BELOW_DENSITY", border)
    one, _ = begun("towards-monosemanticity", rows, 40, **settings)
    fixed, kinds = FixedSteps(other, config), set()
    assert other.fixed_plan is not None
    other.fixed_plan.room = 32
    for number in range(6):
        train_step(one, rows.batch(number), config)
        fixed.take(rows.batch(number))
        if (number + 1) % every == 0:
            fixed.settle()
            kinds.add(type(fixed.made))
    assert_twins(one, other)
    assert other.fixed_plan.resume_at == 0
    assert every > 1 or len(kinds) == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns
@pytest.mark.parametrize("recipe", ["jumprelu", "anthropic-2024-04"])
def test_rows_that_are_not_finite_change_nothing_and_are_refused(recipe: str) -> None:
    rows, settings = Rows(12, 8), PENALISED[recipe][1]
    state, config = begun(recipe, rows, 40, **settings)
    fixed = FixedSteps(state, config)
    bad = rows.batch(0).x.clone()
    bad[3, 2] = torch.nan
    before = {name: tensor.clone() for name, tensor in tensors(state).items()}
    fixed.take(Batch(bad))
    fixed.take(rows.batch(1))
    assert fixed.made.buffers.flags.tolist() == [NOT_FINITE]
    assert not any(parameter.grad.any() for parameter in state.sae.parameters())
    with pytest.raises(ValueError, match=r"the loss is nan at step 1\. .* rows of this batch are not finite"):
        fixed.settle()
    assert state.step == 0
    for name, tensor in tensors(state).items():
        assert torch.equal(tensor, before[name]), name


def test_a_dense_step_asks_for_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a step is sparse, the device says so by itself, and what was launched after it changes nothing."""
    rows, settings = Rows(12, 8), {"l1": 2.0, "resample_shares": ()}
    state, config = begun("towards-monosemanticity", rows, 40, **settings)
    monkeypatch.setattr(fixed_steps, "SPARSE_BELOW_DENSITY", 0.99)
    fixed = FixedSteps(state, config)

    def refuse(*_: Any) -> None:
        raise AssertionError("waits for the device")

    fixed.take(rows.batch(0))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        fixed.made.run()
    assert fixed.made.buffers.steps_done.tolist() == [1]
    assert fixed.made.buffers.flags.tolist() == [SPARSE]
