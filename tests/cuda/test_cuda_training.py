"""Training on a GPU: fixed steps against general ones, their graph, resuming, rows, states and the first weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from step_fakes import Rows, make_sparse, rows_for
from torch import Tensor

from sae.kernels import choose
from sae.training import loop, state, step
from sae.training.config import TrainConfig
from sae.training.fixed_plan import can_be_fixed
from sae.training.fixed_steps import FixedSteps
from sae.training.recipes import RECIPES, resolve
from sae.training.rows import Batch
from sae.training.snapshots import Snapshots
from sae.training.state import TrainState

D_IN, N_ROWS, D_SAE, K = (64, 256, 1024, 8) if torch.cuda.is_available() else (8, 8, 24, 2)


def rows_of(name: str) -> Rows:
    return rows_for(RECIPES[name], D_IN, N_ROWS)


def config_of(name: str, steps: int = 40, **settings: Any) -> TrainConfig:
    more = {"k": K} if RECIPES[name].activation in ("topk", "batchtopk") else {}
    usual = {"d_sae": D_SAE, "tokens": N_ROWS * steps, "batch_tokens": N_ROWS, "dead_tokens": 10**6}
    return resolve(name, **(usual | more | settings))[1]


def begun(name: str, device: torch.device, **settings: Any) -> tuple[TrainState, TrainConfig]:
    """A run at its start; of the recipes that need more than rows, whose dense steps are general ones, a sparse run."""
    rows, config = rows_of(name), config_of(name, **settings)
    started = state.start(rows, config, RECIPES[name], choose("triton", device), device)
    if RECIPES[name].needs:
        make_sparse(started, rows)
    return started, config


def on(device: torch.device, batch: Batch) -> Batch:
    return batch._replace(**{n: part.to(device) for n, part in batch._asdict().items() if isinstance(part, Tensor)})


def assert_close(one: TrainState, other: TrainState) -> None:
    for name, tensor in one.sae.tensors().items():
        error = (other.sae.tensors()[name] - tensor).norm() / tensor.norm().clamp_min(1e-6)
        assert error < 1e-3, f"{name} differs by {error:.1e}"
    assert one.step == other.step


# Those without k begin with dense steps.
FIXED = [name for name, recipe in RECIPES.items() if can_be_fixed(recipe, config_of(name))]


@pytest.mark.parametrize("name", FIXED)
def test_fixed_steps_do_what_general_steps_do(device: torch.device, name: str) -> None:
    rows = rows_of(name)
    (one, config), (other, _) = (begun(name, device) for _ in range(2))
    fixed = FixedSteps(other, config)
    for number in range(3 if device.type == "cuda" else 1):
        step.train_step(one, rows.batch(number), config)
        fixed.take(rows.batch(number))
    fixed.settle()
    assert_close(one, other)
    assert other.fixed_plan is not None
    assert other.fixed_plan.resume_at == 0


@pytest.mark.parametrize("name", FIXED)
def test_the_graph_takes_the_launches_steps_without_a_wait_and_twice_the_same(gpu: torch.device, name: str) -> None:
    from sae.kernels.triton_step.graph import captured

    results = []
    batches = [on(gpu, rows_of(name).batch(n)) for n in range(4)]
    for how in (lambda made: made.run, captured, captured):
        started, config = begun(name, gpu)
        fixed = FixedSteps(started, config, how)
        fixed.take(batches[0])
        fixed.settle()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(1, 20):
                fixed.take(batches[number % 4])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        fixed.settle()
        results.append([tensor.clone() for tensor in started.sae.tensors().values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_that_are_not_finite_are_refused_and_change_nothing(gpu: torch.device) -> None:
    rows, (started, config) = rows_of("topk"), begun("topk", gpu)
    fixed, before = FixedSteps(started, config), {n: t.clone() for n, t in started.sae.tensors().items()}
    bad = rows.batch(0).x.clone()
    bad[3, 2] = torch.nan
    fixed.take(Batch(bad))
    fixed.take(rows.batch(1))
    with pytest.raises(ValueError, match="rows of this batch are not finite"):
        fixed.settle()
    assert all(torch.equal(tensor, before[name]) for name, tensor in started.sae.tensors().items())


def test_bfloat16_selection_trains_much_as_float32_does(device: torch.device, tmp_path: Path) -> None:
    errors = []
    for precision in ("float32", "bf16"):
        config = config_of("topk", steps=100 if device.type == "cuda" else 4, precision=precision)
        out = tmp_path / precision
        sae = loop.train(rows_of("topk"), out, config, device=device.type, kernels="triton")
        x = rows_of("topk").sample(1000, 99)
        errors.append(float((sae.reconstruct(x) - x).pow(2).sum() / x.pow(2).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=0.2)


# --- resuming, states, first weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk", "balanced"])
def test_a_resumed_run_is_the_unbroken_one(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    steps = 60 if device.type == "cuda" else 4
    config = config_of(name, steps, dead_tokens=N_ROWS * 8)
    how: dict[str, Any] = {"device": device.type, "kernels": "triton"}
    whole = loop.train(rows_of(name), tmp_path / "whole", config, **how)
    advance = loop.Run.advance

    def broken(run: loop.Run, *args: Any) -> str:
        if run.state.step == steps // 2:
            raise KeyboardInterrupt
        return advance(run, *args)

    monkeypatch.setattr(loop.Run, "advance", broken)
    with pytest.raises(KeyboardInterrupt):
        loop.train(rows_of(name), tmp_path / "broken", config, **how, save_minutes=0.0)
    monkeypatch.setattr(loop.Run, "advance", advance)
    again = loop.train(rows_of(name), tmp_path / "broken", config, **how)
    for tensor_name, tensor in whole.tensors().items():
        assert torch.equal(tensor, again.tensors()[tensor_name]), tensor_name


def test_a_snapshot_is_of_the_moment_it_was_taken(device: torch.device) -> None:
    """The tensors change right after, while the copy may still be under way."""
    n = 2**26 if device.type == "cuda" else 100
    tensors = {"a": torch.zeros(n, device=device), "b": torch.zeros(n // 4, 4, device=device).t()}
    snapshots, found = Snapshots(device), []
    for number in range(3):
        snapshots.take(
            tensors, lambda copies: found.append([(t.amin().item(), t.amax().item()) for t in copies.values()])
        )
        for tensor in tensors.values():
            tensor.fill_(number + 1)
    snapshots.close()
    assert found == [[(float(n), float(n))] * 2 for n in range(3)]


def test_the_first_weights_are_those_of_the_cpu_but_for_rounding(gpu: torch.device) -> None:
    """At random; from data, what is chosen may differ: then every decoder row is a direction of the sample."""
    rows = rows_of("towards-monosemanticity")
    config = config_of("towards-monosemanticity")
    recipe = RECIPES["towards-monosemanticity"]
    here, there = (
        state.start(rows, config, recipe, choose("reference", place), place) for place in (gpu, torch.device("cpu"))
    )
    for name, tensor in there.sae.tensors().items():
        torch.testing.assert_close(here.sae.tensors()[name].cpu(), tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert here.scale == there.scale
    one, other = (begun("topk", place)[0] for place in (gpu, gpu))
    assert all(torch.equal(a, b) for a, b in zip(one.sae.parameters(), other.sae.parameters(), strict=True))


def test_numbers_that_are_not_finite_are_found(device: torch.device) -> None:
    weights = [torch.randn(300, 70, device=device).t(), torch.randn(31, device=device)]
    assert step.all_finite(weights)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for tensor in weights:
            place = (3,) * tensor.dim()
            before = tensor[place].item()
            tensor[place] = bad
            assert not step.all_finite(weights)
            tensor[place] = before


def test_the_check_needs_little_memory(gpu: torch.device) -> None:
    weights = torch.zeros(2**26, device=gpu)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    assert step.all_finite([weights])
    assert torch.cuda.max_memory_allocated() - held < weights.numel() * 4 / 100
