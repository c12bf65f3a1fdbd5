"""How long jobs show progress (a bar with rate and ETA) and stop (a flag that a signal sets)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm


@contextmanager
def progress(description: str, total: int, unit: str, *, initial: int = 0, shown: bool = True) -> Iterator[tqdm]:
    """A progress bar with rate and ETA on standard error; one line every 30 s if that is not a terminal."""
    interval_s = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=True,
        mininterval=interval_s,
        dynamic_ncols=True,
        smoothing=0.05,
        disable=not shown,
    ) as bar:
        yield bar


STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1


class Interrupt:
    """`requested` becomes true on the first Ctrl-C, SIGTERM or SIGUSR1 (pre-emption); a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self.before: dict[int, Any] = {}  # the handlers in whose place it is

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested and number == signal.SIGTERM and callable(self.before.get(number)):
            self.before[number](number, frame)
        self.requested = True


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Inside, Ctrl-C, SIGTERM and SIGUSR1 set a flag instead of killing. Without effect outside the main thread."""
    interrupt = Interrupt()
    try:
        for s in STOPPING:
            interrupt.before[s] = signal.signal(s, interrupt._handle)
    except ValueError:  # not the main thread, the only one that may handle signals
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        for number, handler in interrupt.before.items():
            signal.signal(number, handler)


class Interrupted(Exception):
    """The job stopped on request with everything saved; the message says how to continue."""
