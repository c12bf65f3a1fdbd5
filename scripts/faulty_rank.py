"""One rank of a training in which rank 1 fails in a chosen way; `scripts/check_ranks.py` starts it under torchrun.

usage: torchrun … scripts/faulty_rank.py FAULT MARK train …   (MARK: a file that gets the time of the fault)
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae.cli.__main__ import run
from sae.pipeline.rows import StoreRows
from sae.training import state_files
from store.activations import ActivationStore

FAULTS = ("none", "exception", "stall", "kill -9", "full disk", "unreadable shard")
AT_STEP = 40


def arm(fault: str, mark: Path) -> None:
    """Makes this rank, if it is rank 1, fail at step AT_STEP."""
    if os.environ["RANK"] != "1":
        return

    def now() -> None:
        mark.write_text(str(time.time()))

    def in_batch(do: Callable[[], Any]) -> None:
        batch = StoreRows.batch

        def faulty(self: StoreRows, step: int) -> Any:
            if step == AT_STEP:
                now()
                do()
            return batch(self, step)

        StoreRows.batch = faulty  # type: ignore[method-assign]

    def fail() -> None:
        raise ValueError("something that nobody foresaw")

    if fault == "exception":
        in_batch(fail)
    elif fault == "stall":
        in_batch(lambda: time.sleep(3600))
    elif fault == "kill -9":
        in_batch(lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif fault == "full disk":

        def full(path: Path, *_: Any) -> None:
            now()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        state_files.write_tensors = full  # type: ignore[assignment]
    elif fault == "unreadable shard":

        def unreadable(self: ActivationStore, split: str, shard: int, hook: str) -> Any:
            now()
            raise OSError(errno.EIO, "Input/output error", f"{self.path}/{split} shard {shard}")

        ActivationStore.read_stored = unreadable  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, mark, *arguments = sys.argv[1:]
    arm(fault, Path(mark))
    run(arguments)
