"""What the store's tests share with all others, for a run without torch (scripts/newest_zarr.sh): a pytest plugin."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """What fsync protects from is a loss of power, which no test here makes; a killed process loses nothing by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which versions ran: the store must hold on the newest zarr, and on the last one for Python 3.11."""
    held = ", ".join(f"{name} {version(name)}" for name in ("zarr", "numpy"))
    terminalreporter.write_line(f"ran on Python {platform.python_version()}, {held}")
