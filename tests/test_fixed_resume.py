"""A run in fixed shapes that stops and continues is the unbroken run, in every bit that it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_fixed_step import DEVICE, Rows, fixed_anywhere, make_sparse  # noqa: F401

from sae.jobs.checkpoint import read_header, read_tensors
from sae.training import loop
from sae.training.fixed_steps import FixedSteps
from sae.training.recipes import resolve
from sae.training.rows import Batch
from sae.training.state import TrainState, start
from sae.training.step import train_step

STEPS, STOP = 6, 3
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AuxK": ("topk", {"k": 2, "resample_shares": (), "dead_tokens": 8}),
    "thresholds and AuxK": ("matryoshka", {"k": 2, "dead_tokens": 8}),
    "the search for λ": ("jumprelu", {"target_l0": 1, "bandwidth": 0.3, "min_density": 0.01}),
    "the search for λ while it is dense": ("gated", {"target_l0": 4, "resample_shares": ()}),
}


@pytest.mark.filterwarnings("ignore:.*the search for λ ended:UserWarning")  # after so few steps
@pytest.mark.parametrize("case", CASES)
def test_a_run_continues_bit_for_bit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run looks at the device once, at its end; the other after every step, and begins anew in its middle."""
    recipe, settings = CASES[case]
    rows = Rows(8, 4)
    _, config = resolve(recipe, d_sae=16, tokens=STEPS * rows.rows, batch_tokens=rows.rows, **settings)
    if recipe == "jumprelu":
        monkeypatch.setattr(loop, "start", sparse_from_the_start)

    def train(out: str, save_minutes: float) -> None:
        loop.train(rows, tmp_path / out, config, kernels="triton", device=DEVICE, save_minutes=save_minutes)

    general = []
    monkeypatch.setattr(
        "sae.training.fixed_steps.train_step", lambda *args: general.append(args[0].step) or train_step(*args)
    )
    train("whole", 60.0)
    take = FixedSteps.take

    def broken(steps: FixedSteps, batch: Batch) -> None:
        if steps.state.step == STOP:
            raise KeyboardInterrupt
        take(steps, batch)

    with monkeypatch.context() as patch:
        patch.setattr(FixedSteps, "take", broken)
        with pytest.raises(KeyboardInterrupt):
            train("broken", 0.0)
    held = read_header(tmp_path / "broken" / "state.safetensors")
    assert held["step"] == STOP
    train("broken", 60.0)
    whole, again = (tmp_path / out / "state.safetensors" for out in ("whole", "broken"))
    (tensors, ended), (found, again_ended) = read_tensors(whole), read_tensors(again)
    assert ended == again_ended
    assert tensors.keys() == found.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, found[name]), name
    assert_that_it_took_part(case, held, ended, general)


def sparse_from_the_start(*args: Any) -> TrainState:
    state = start(*args)
    make_sparse(state, Rows(8, 4))
    state.step = state.optimizer.step_count = state.penalty.step = 0
    return state


def assert_that_it_took_part(case: str, stopped: dict[str, Any], ended: dict[str, Any], general: list[int]) -> None:
    """What the case is named after changed before the stop and after it, and steps were fixed ones."""
    assert len(general) < STEPS
    if "AuxK" in case:
        assert stopped["fixed_step"]["dead_room"] > 0
    else:
        assert stopped["penalty"]["coefficient"] != ended["penalty"]["coefficient"]
        assert stopped["penalty"]["response"] != 1.0
