"""The training step in fixed shapes against the general one, in Triton's interpreter: on a GPU only if there is one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FewRows
from step_fakes import Rows, make_sparse, rows_for
from torch import Tensor

from sae.jobs.checkpoint import read_header
from sae.kernels import choose
from sae.kernels.triton_step import DEAD, NOT_FINITE, OVERRUN
from sae.kernels.triton_step.buffers import LARGEST_ROOM, SMALLEST_DEAD_ROOM, Sizes, dead_room_for
from sae.training import downstream_gradient, fixed_plan, loop
from sae.training.config import TrainConfig
from sae.training.fixed_plan import FORGET_AFTER, LONGEST_WAIT, FixedPlan, plan_for, runs_on
from sae.training.fixed_steps import FixedSteps, fixed_step_of
from sae.training.recipes import RECIPES as RECIPES_BY_NAME
from sae.training.recipes import resolve
from sae.training.rows import Batch
from sae.training.sparsity_penalty import LambdaController, search_constants
from sae.training.state import TrainState, start
from sae.training.step import train_step

triton = pytest.importorskip("triton")
from sae.kernels.triton_step import penalty as penalty_kernels  # noqa: E402
from sae.kernels.triton_step.step import FixedStep  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fixed_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs plan fixed-shape steps on this device, whatever it is."""
    monkeypatch.setattr(fixed_plan, "runs_on", lambda device: True)


def begun(recipe: str, rows: Rows, d_sae: int, **settings: Any) -> tuple[TrainState, TrainConfig]:
    usual = {"d_sae": d_sae, "tokens": rows.rows * 40, "batch_tokens": rows.rows, "dead_tokens": 10**6}
    found, config = resolve(recipe, **(usual | settings))
    return start(rows, config, found, choose("triton", DEVICE), DEVICE), config


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Everything that a step changes."""
    return {**state.sae.tensors(), **state.optimizer.tensors(), "tokens_since_fired": state.tokens_since_fired}


def assert_twins(one: TrainState, other: TrainState) -> None:
    """The same parameters, moments and counts, but for the order of float32 sums."""
    for name, tensor in one.sae.tensors().items():
        torch.testing.assert_close(other.sae.tensors()[name], tensor, rtol=2e-5, atol=2e-6, msg=f"{name} differs")
    for name, tensor in one.optimizer.tensors().items():
        torch.testing.assert_close(other.optimizer.tensors()[name], tensor, rtol=1e-4, atol=1e-6, msg=f"{name} differs")
    assert torch.equal(one.tokens_since_fired, other.tokens_since_fired)
    for state in (one, other):
        assert state.step == state.optimizer.step_count == state.penalty.step
    assert one.step == other.step
    assert one.penalty.saved() == pytest.approx(other.penalty.saved(), rel=1e-5)
    assert one.density == pytest.approx(other.density, rel=1e-6)


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "topk of many": ("topk", {"k": 9}),
    "topk, some dead": ("topk", {"k": 3, "clip": 0.5}),
    "batch-topk": ("batch-topk", {"k": 3}),
    "balanced": ("balanced", {"k": 3}),
    "matryoshka, some dead": ("matryoshka", {"k": 3, "clip": 0.5}),
    "towards-monosemanticity": ("towards-monosemanticity", {"l1": 2.0, "resample_shares": (), "target_l0": 1}),
    "anthropic-2024-04": ("anthropic-2024-04", {"l1": 2.0}),
    "jumprelu": ("jumprelu", {"l0_penalty": 3.0, "bandwidth": 0.3, "min_density": 0.01, "clip": 0.5}),
    "gated": ("gated", {"l1": 2.0, "resample_shares": (), "clip": 0.5}),
    "p-anneal": ("p-anneal", {"l1": 2.0, "resample_shares": (), "p_from_share": 0.0}),
    "transcoder with a skip": ("transcoder", {"l1": 2.0, "skip": True, "clip": 1.0}),
    "crosscoder": ("crosscoder", {"l1": 2.0}),
    "end-to-end": ("end-to-end", {"l1": 0.1, "resample_shares": ()}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_fixed_step_does_what_the_general_step_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, settings = RECIPES[name]
    n_dead = 9 if "dead" in name else 0
    rows = rows_for(RECIPES_BY_NAME[recipe], 12, 8)
    (one, config), (other, _) = (begun(recipe, rows, 40, **settings) for _ in range(2))
    if not config.k:
        for state in (one, other):
            make_sparse(state, rows)
    monkeypatch.setattr(downstream_gradient, "KL_ROWS", 5)  # two chunks
    fixed = FixedSteps(other, config)
    for step in range(2):
        for state in (one, other):
            state.tokens_since_fired[:n_dead] = 10**6
        expected = train_step(one, rows.batch(step), config)
        fixed.take(rows.batch(step))
        found = fixed.settle()
        assert not fixed.made.buffers.flags.any()
        assert fixed.made.buffers.steps_done.tolist() == [other.step]
        assert_twins(one, other)
        for figure in ("loss", "error", "l0", "x"):
            torch.testing.assert_close(found[figure], expected[figure], rtol=1e-5, atol=0)
    assert all(moment.any() for moment in other.optimizer.tensors().values())
    assert 0 < other.density < 1 / 20 or config.k
    assert not config.clip or fixed.made.buffers.clip_factor < 1
    assert not fixed.made.buffers.counts.any()
    assert not fixed.made.buffers.bitmap.any()
    assert other.fixed_plan is not None
    assert other.fixed_plan.resume_at == 0


@triton.jit
def searched(penalty, now, active, at, rows, log_target, start, stop, gain):  # type: ignore[no-untyped-def]
    penalty_kernels.search(penalty, now, active, at, rows, log_target, start, stop, gain)


def test_lambda_is_searched_for_on_the_device_as_on_the_host() -> None:
    """Over a whole run: while it warms up, while it is searched for, and at the end."""
    _, config = resolve("jumprelu", d_sae=4096, tokens=40, batch_tokens=1, target_l0=20, penalty_warmup_share=0.2)
    there, rows = LambdaController.start(config, 2.0), 100
    held = torch.tensor(list(there.saved().values()), dtype=torch.float64, device=DEVICE)
    for step in range(config.steps):
        entries = 400 + 97 * step * (40 - step) % 7000
        now = torch.tensor([0.0, 0.0, 0.0, there.warmup(step) / there.warmup(step + 1)], device=DEVICE)
        active = torch.tensor([entries], dtype=torch.int32, device=DEVICE)
        searched[(1,)](held, now, active, step, rows, *search_constants(config))
        there.update(entries / rows)
        assert held.tolist() == pytest.approx(list(there.saved().values()), rel=1e-5)


@pytest.mark.parametrize("name", ["batch-topk", "topk of many", "jumprelu", "gated"])
def test_in_bfloat16_the_product_itself_decides(name: str) -> None:
    """From the same weights: weights that differ in their last bits may be rounded to other bfloat16 numbers."""
    recipe, settings = RECIPES[name]
    rows = Rows(12, 8)
    (one, config), (other, _) = (
        begun(recipe, rows, 40, **settings | {"precision": "bf16", "clip": 0.0}) for _ in range(2)
    )
    with torch.no_grad():
        for state in (one, other):
            state.sae.b_enc += torch.linspace(-0.1, 0.1, 40, device=DEVICE)
            if not config.k:
                make_sparse(state, rows)
    fixed, batch = FixedSteps(other, config), rows.batch(1)
    factors = batch.x.to(DEVICE) * one.scale - one.sae.input_bias, one.sae.W_enc
    product = torch.addmm(one.sae.b_enc.bfloat16(), *(factor.bfloat16() for factor in factors))
    expected = train_step(one, batch, config)
    fixed.take(batch)
    found = fixed.settle()
    assert not fixed.made.buffers.flags.any()
    active = chosen(fixed.made)
    if recipe != "gated":  # which makes other values of them
        assert torch.equal(active[active > 0], product[active > 0].float())
    assert active.count_nonzero() == (config.k * 8 if config.k else round(expected["l0"].item() * 8)) > 0
    assert_twins(one, other)
    for figure in ("loss", "error", "l0", "x"):
        torch.testing.assert_close(found[figure], expected[figure], rtol=1e-5, atol=0)


def chosen(step: FixedStep) -> Tensor:
    """What the step chose last, as a matrix."""
    held, found = step.buffers, torch.zeros(step.sizes.rows, step.sizes.d_sae, device=DEVICE)
    for row, kept in enumerate(held.kept.tolist()):
        found[row, held.features[row, :kept].long()] = held.values[row, :kept]
    return found


@pytest.mark.parametrize("recipe", ["topk", "balanced"])
def test_the_choice_is_that_of_exact_products(recipe: str) -> None:
    """Values that float16 cannot tell apart, equal features, a row of zeros, equal rows, few positive values."""
    rows, d_sae, k = Rows(16, 8), 90, 4
    state, config = begun(recipe, rows, d_sae, k=k)
    g = torch.Generator().manual_seed(5)
    shared = torch.randn(16, generator=g)
    weights = shared + 1e-4 * torch.randn(d_sae, 16, generator=g)
    weights[50:60] = weights[40:50]  # equal to the bit
    weights[60:] = -shared
    assert state.fixed_plan is not None
    state.fixed_plan.room, state.scale = 128, 1.0
    with torch.no_grad():
        state.sae.W_enc.copy_(weights.t())
        state.sae.b_enc.copy_(torch.linspace(-1e-4, 1e-4, d_sae))
        state.sae.b_enc[40:50] = state.sae.b_enc[50:60] = 0.0
        state.sae.b_dec.zero_()
    x = shared.sign() + 1e-5 * torch.randn(8, 16, generator=g)
    x[2], x[4] = 0.0, x[3]
    x[5:] *= -0.01 if recipe == "topk" else -1.0
    step = fixed_step_of(state, config)
    pre = x.double() @ weights.double().t() + state.sae.b_enc.detach().cpu().double()
    step.buffers.x.copy_(x)
    step.run()
    assert not step.buffers.flags.any()
    found = chosen(step).cpu()
    active = found > 0
    torch.testing.assert_close(found.double()[active], pre[active], rtol=1e-5, atol=1e-6)
    gap = 1e-5  # less than float16 can tell apart at these values, more than float32 rounds
    spans = [slice(row, row + 1) for row in range(8)] if recipe == "topk" else [slice(0, 8)]
    for span in spans:
        positive = int((pre[span] > gap).sum())
        wanted = min(k * (span.stop - span.start), int((pre[span] > 0).sum()))
        assert int(active[span].sum()) == wanted
        if positive > wanted > 0:
            assert pre[span][active[span]].min() >= pre[span][~active[span]].max() - gap
    twice = active[:, 50:60] & ~active[:, 40:50]
    assert not twice.any()  # of two equal features the first is chosen


def test_fewer_positive_values_than_places_are_all_chosen() -> None:
    rows = Rows(8, 6)
    state, config = begun("batch-topk", rows, 24, k=5)
    x = rows.batch(0).x.to(DEVICE)
    with torch.no_grad():
        pre = (x * state.scale - state.sae.b_dec) @ state.sae.W_enc
        largest = pre.flatten().sort(descending=True).values
        state.sae.b_enc.fill_(-(largest[11] + largest[12]) / 2)
        expected = (pre + state.sae.b_enc).relu()
    assert int((expected > 0).sum()) == 12
    step = fixed_step_of(state, config)
    step.buffers.x.copy_(x)
    step.run()
    torch.testing.assert_close(chosen(step), expected, rtol=1e-4, atol=1e-5)


def test_the_screens_product_adds_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch.backends.cuda.matmul
    assert settings.allow_fp16_reduced_precision_reduction  # PyTorch's default
    seen = []
    multiply = torch.addmm

    def watched(*args: Any, **out: Any) -> Tensor:
        seen.append(settings.allow_fp16_reduced_precision_reduction)
        return multiply(*args, **out)

    monkeypatch.setattr(torch, "addmm", watched)
    rows = Rows(8, 4)
    state, config = begun("topk", rows, 16, k=2)
    step = fixed_step_of(state, config)
    seen.clear()
    step.run()
    assert seen == [False]
    assert settings.allow_fp16_reduced_precision_reduction


# --- what cannot be done in fixed shapes -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns
def test_rows_that_are_not_finite_change_nothing_and_are_refused() -> None:
    rows = Rows(8, 6)
    state, config = begun("topk", rows, 24, k=2)
    fixed = FixedSteps(state, config)
    bad = rows.batch(0).x.clone()
    bad[3, 2] = torch.nan
    before = {name: tensor.clone() for name, tensor in tensors(state).items()}
    fixed.take(Batch(bad))
    fixed.take(rows.batch(1))
    assert fixed.made.buffers.flags.tolist() == [NOT_FINITE]
    with pytest.raises(ValueError, match=r"the loss is nan at step 1\. .* rows of this batch are not finite"):
        fixed.settle()
    assert state.step == 0
    for name, tensor in tensors(state).items():
        assert torch.equal(tensor, before[name]), name


def test_steps_without_room_are_taken_as_they_must_be_however_late_that_is_noticed() -> None:
    """The first steps have too many candidates, and are general ones; from the third on, more and more features die."""
    rows, settings = Rows(8, 6), {"k": 3, "dead_tokens": 12}
    one, config = begun("topk", rows, 60, **settings)
    for step in range(5):
        train_step(one, rows.batch(step), config)
    found = []
    for every in (1, 5):
        other, _ = begun("topk", rows, 60, **settings)
        assert other.fixed_plan is not None
        other.fixed_plan.room = 2
        fixed = FixedSteps(other, config)
        for step in range(5):
            fixed.take(rows.batch(step))
            if step == 0:
                assert fixed.made.buffers.flags.tolist() == [OVERRUN]
            if (step + 1) % every == 0:
                fixed.settle()
        assert_twins(one, other)
        assert other.fixed_plan.last_halt >= 0
        assert other.fixed_plan.room > 2
        assert other.dead(12).any()
        assert fixed.made.sizes.dead_room == other.fixed_plan.dead_room > 0
        found.append(other)
    for name, tensor in tensors(found[0]).items():
        assert torch.equal(tensor, tensors(found[1])[name]), name
    assert found[0].fixed_plan == found[1].fixed_plan


def test_the_room_for_dead_features_follows_their_number() -> None:
    """Here it is far too large, which the device says by itself."""
    rows = Rows(8, 6)
    state, config = begun("topk", rows, 24, k=2)
    assert state.fixed_plan is not None
    state.fixed_plan.dead_room = 128
    state.tokens_since_fired[:3] = 10**6
    fixed = FixedSteps(state, config)
    for step in range(2):
        fixed.take(rows.batch(step))
    assert fixed.made.buffers.steps_done.tolist() == [1]
    assert fixed.made.buffers.flags.tolist() == [DEAD]
    fixed.settle()
    assert (state.step, state.fixed_plan.resume_at) == (2, 0)
    assert state.fixed_plan.dead_room == SMALLEST_DEAD_ROOM
    assert [dead_room_for(n) for n in (0, 1, 22, 43, 5000)] == [32, 32, 64, 64, 8192]


def test_waits_double_while_halts_come_close_together() -> None:
    sizes = Sizes(8, 8, 4096, 4, 32)
    plan = FixedPlan(32)
    plan.halted(7, sizes, overrun=True)
    assert (plan.room, plan.resume_at) == (64, 8)
    for wait in (2, 4, 8):
        plan.halted(plan.resume_at, sizes, overrun=False)
        assert plan.resume_at == plan.last_halt + wait
    assert plan.room == 64
    plan.halted(plan.last_halt + FORGET_AFTER, sizes, overrun=False)
    assert plan.wait == 1
    for _ in range(20):
        plan.halted(plan.last_halt + 1, Sizes(8, 8, 4096, 4, plan.room), overrun=True)
    assert (plan.wait, plan.room) == (LONGEST_WAIT, LARGEST_ROOM)


# --- in the trainer --------------------------------------------------------------------------------------------------


class RecordedGraph:
    """Stands for a CUDA graph: the launches of one step, taken again with the very arguments of the capture."""

    def __init__(self, step: FixedStep) -> None:
        from triton.runtime.interpreter import GridExecutor

        self.launches: list[Callable[[], object]] = []
        execute = GridExecutor.__call__

        def record(executor: Any, *args: Any, **options: Any) -> None:
            self.launches.append(lambda: execute(executor, *args, **options))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", record)
            for name in ("addmm", "mm", "bmm"):
                patch.setattr(torch, name, self._recorded(getattr(torch, name)))
            step.run()

    def _recorded(self, multiply: Callable[..., object]) -> Callable[..., None]:
        return lambda *args, **out: self.launches.append(lambda: multiply(*args, **out))

    def replay(self) -> None:
        for launch in self.launches:
            launch()


@pytest.mark.skipif(DEVICE == "cuda", reason="records in the interpreter")
def test_a_replayed_graph_takes_the_steps_that_the_launches_take() -> None:
    """Also after features have died, which makes it another graph."""
    rows = Rows(8, 6)
    (one, config), (other, _) = (begun("matryoshka", rows, 24, k=2, dead_tokens=12) for _ in range(2))
    eager, replayed = FixedSteps(one, config), FixedSteps(other, config, lambda step: RecordedGraph(step).replay)
    for step in range(3):
        eager.take(rows.batch(step))
        replayed.take(rows.batch(step))
    eager.settle()
    replayed.settle()
    assert one.step == other.step == 3
    assert replayed.made.sizes.dead_room
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, tensors(other)[name]), name


def test_a_run_continues_bit_for_bit_with_the_room_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step does not fit, the next ones do; resampling changes the weights between two steps."""
    monkeypatch.setattr(fixed_plan, "first_room", lambda *_, **__: 4)
    settings = {"k": 3, "resample_shares": (0.7,), "dead_tokens": 16, "aux_coefficient": 0.0}
    _, config = resolve("topk", d_sae=24, tokens=6 * 16, batch_tokens=16, **settings)
    whole = loop.train(FewRows(), tmp_path / "whole", config, kernels="triton", device=DEVICE)
    take = FixedSteps.take

    def broken(steps: FixedSteps, batch: Batch) -> None:
        if steps.state.step == 3:
            raise KeyboardInterrupt
        take(steps, batch)

    monkeypatch.setattr(FixedSteps, "take", broken)
    with pytest.raises(KeyboardInterrupt):
        loop.train(FewRows(), tmp_path / "broken", config, kernels="triton", device=DEVICE, save_minutes=0.0)
    monkeypatch.setattr(FixedSteps, "take", take)
    assert read_header(tmp_path / "broken" / "state.safetensors")["fixed_step"]["room"] > 4
    again = loop.train(FewRows(), tmp_path / "broken", config, device=DEVICE)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    for name in ("metrics.jsonl", "resampled.jsonl"):
        one, other = ((tmp_path / run / name).read_text() for run in ("whole", "broken"))
        assert one.count("\n") == other.count("\n")


def test_only_a_gpu_takes_fixed_steps_and_only_of_recipes_written_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    def planned(name: str, device: torch.device = gpu, kernels: str = "triton", **settings: Any) -> bool:
        recipe, config = resolve(name, d_sae=4096, tokens=10**6, **settings)
        return plan_for(recipe, config, device, kernels) is not None

    monkeypatch.setattr(fixed_plan, "runs_on", runs_on)
    assert all(planned(name) for name in RECIPES_BY_NAME)
    assert not planned("topk", cpu)
    assert not planned("topk", kernels="reference")
    assert not planned("topk", multi_k=4)
    assert not planned("topk", k=1000)
    monkeypatch.setenv("SAE_FIXED_STEP", "0")
    assert not planned("topk")


def test_the_gpu_check_says_so_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    assert importlib.import_module("check_gpu").main() == 2
    assert "needs a CUDA device, and none is available" in capsys.readouterr().err
