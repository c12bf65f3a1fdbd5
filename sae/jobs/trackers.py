"""Copies of a run's log for TensorBoard and Weights & Biases; metrics.jsonl stays the authoritative one.

A tracker is a context manager: it takes a run's directory, its settings and the step that the run starts from, and
gives a function that takes each later entry of metrics.jsonl. A resumed run logs the steps after its checkpoint again,
with the same values.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from store.common import write_bytes

Entry = Mapping[str, Any]
Log = Callable[[Entry], None]
Tracker = Callable[[Path, Mapping[str, Any], int], AbstractContextManager[Log]]


@contextmanager
def tensorboard(out: Path, settings: Mapping[str, Any], step: int) -> Iterator[Log]:
    """Writes event files to `out`/tensorboard; entries of an earlier attempt after `step` are dropped."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard"), purge_step=step + 1) as writer:

        def log(entry: Entry) -> None:
            for name, value in _numbers(entry).items():
                writer.add_scalar(name, value, entry["step"])

        yield log


@contextmanager
def weights_and_biases(out: Path, settings: Mapping[str, Any], step: int) -> Iterator[Log]:
    """Logs one wandb run, named like its directory, to `out`/wandb. It is offline unless WANDB_MODE says otherwise.

    `wandb sync out/wandb/offline-run-*` uploads it later: all attempts of a training have one id, so each step counts
    once.
    """
    import wandb

    identity = out / "wandb" / "id"
    if not identity.is_file():
        write_bytes(identity, uuid.uuid4().hex.encode())
    run = wandb.init(
        dir=str(out),
        id=identity.read_text(encoding="utf-8"),
        name=out.name,
        resume="allow",
        config=dict(settings),
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
    )
    try:
        yield lambda entry: run.log(_numbers(entry), step=entry["step"])
    finally:
        run.finish()


TRACKERS: dict[str, Tracker] = {"tensorboard": tensorboard, "wandb": weights_and_biases}  # by package


def trackers_named(names: Sequence[str]) -> list[Tracker]:
    """The trackers with these names. Raises: ValueError for an unknown name, or a package that is not installed."""
    found = []
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}: use {' or '.join(TRACKERS)}.")
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed: pip install 'monosem[{name}]', or read metrics.jsonl.")
        found.append(TRACKERS[name])
    return found


def _numbers(entry: Entry) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "step"}
