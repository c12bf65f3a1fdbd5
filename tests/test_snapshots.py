"""States that are written while training goes on, and the check for numbers that are not finite."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FewRows
from torch.utils._python_dispatch import TorchDispatchMode

from sae.jobs.checkpoint import read_header, read_tensors
from sae.jobs.progress import Interrupted
from sae.training import loop
from sae.training.recipes import resolve
from sae.training.snapshots import Snapshots
from sae.training.step import all_finite
from store.common import DiskFull

CPU = torch.device("cpu")


def test_a_snapshot_holds_what_the_tensors_were() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "n": torch.arange(4)}
    changed, found, threads = threading.Event(), [], []

    def write(copies: dict[str, torch.Tensor]) -> None:
        assert changed.wait(10)
        found.append({name: copy.clone() for name, copy in copies.items()})
        threads.append(threading.current_thread())

    snapshots = Snapshots(CPU)
    snapshots.take(tensors, write)
    for tensor in tensors.values():
        tensor.add_(100)
    changed.set()
    snapshots.take(tensors, write)  # waits for the first
    snapshots.close()
    assert torch.equal(found[0]["a"], torch.arange(6.0).view(2, 3).t())
    assert torch.equal(found[0]["n"], torch.arange(4))
    assert torch.equal(found[1]["a"], torch.arange(6.0).view(2, 3).t() + 100)
    assert threading.main_thread() not in threads


def test_what_writing_raised_is_raised_once_and_the_next_snapshot_is_written() -> None:
    def fail(copies: dict[str, torch.Tensor]) -> None:
        raise OSError("no room")

    snapshots, written = Snapshots(CPU), []
    snapshots.take({"a": torch.zeros(2)}, fail)
    with pytest.raises(OSError, match="no room"):
        snapshots.take({"a": torch.ones(2)}, lambda copies: written.append(copies["a"].clone()))
    snapshots.take({"a": torch.ones(2)}, lambda copies: written.append(copies["a"].clone()))
    snapshots.take({"a": torch.zeros(2)}, fail)
    with pytest.raises(OSError, match="no room"):
        snapshots.close()
    assert torch.equal(written[0], torch.ones(2))
    assert len(written) == 1


# --- in the trainer --------------------------------------------------------------------------------------------------


def trained(out: Path, **more: Any) -> None:
    _, config = resolve("topk", d_sae=24, tokens=12 * 16, batch_tokens=16, k=3, resample_shares=(0.5,), dead_tokens=48)
    loop.train(FewRows(), out, config, device="cpu", kernels="reference", save_minutes=0.0, **more)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "saves_beside", lambda state: True)


def test_states_written_beside_training_are_those_written_in_turn(tmp_path: Path, beside: None) -> None:
    trained(tmp_path / "beside", keep=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "saves_beside", lambda state: False)
        trained(tmp_path / "in-turn", keep=20)
    names = sorted(path.name for path in (tmp_path / "in-turn").glob("state*.safetensors"))
    assert len(names) == 12
    assert sorted(path.name for path in (tmp_path / "beside").glob("state*.safetensors")) == names
    for name in names:
        (one, header), (other, theirs) = (read_tensors(tmp_path / run / name) for run in ("beside", "in-turn"))
        assert header == theirs
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items()), name


def test_an_interrupted_run_has_its_state_on_disk(
    tmp_path: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = loop.Run.advance

    def interrupted(run: loop.Run, *args: Any) -> str:
        if run.state.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(run, *args)

    monkeypatch.setattr(loop.Run, "advance", interrupted)
    with pytest.raises(Interrupted, match=r"stopped at step 7 of 12, saved"):
        trained(tmp_path)
    assert read_header(tmp_path / "state.safetensors")["step"] == 7


def test_a_disk_that_is_full_stops_the_run(tmp_path: Path, beside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sae.training.state.write_state", fail)
    with pytest.raises(DiskFull, match="Nothing was saved yet"):
        trained(tmp_path)


# --- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found_anywhere(bad: float) -> None:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(40, 7, generator=g).t(), torch.randn(31, generator=g), torch.randn(3, 5, generator=g)]
    weights.append(torch.empty(0, 5))
    assert all_finite(weights)
    weights[2][0, 0] = torch.finfo(torch.float32).max  # large, and finite: sums and squares of it would not be
    weights[2][0, 1] = torch.finfo(torch.float32).max
    assert all_finite(weights)
    for tensor in weights:
        for place in range(tensor.numel()):
            index = tuple(int(n) for n in torch.unravel_index(torch.tensor(place), tensor.shape))
            before = tensor[index].item()
            tensor[index] = bad
            assert not all_finite(weights)
            tensor[index] = before


def test_the_check_makes_nothing_as_large_as_the_weights() -> None:
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "view" not in func.__name__ and func.__name__ not in ("t.default", "detach.default"):
                found = out if isinstance(out, tuple | list) else (out,)
                made.extend(tensor.numel() for tensor in found if isinstance(tensor, torch.Tensor))
            return out

    with Watch():
        all_finite([torch.zeros(64, 8).t(), torch.zeros(8)])
    assert made
    assert max(made[2:]) <= 4  # the first two are the weights themselves
