"""A pytest plugin to run the store's tests without torch (scripts/newest_zarr.sh): the fixtures that they need."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """fsync protects from a loss of power, which no test here causes; a killed process loses nothing without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which versions ran: the store must work with the newest zarr, and with the last one for Python 3.11."""
    held = ", ".join(f"{name} {version(name)}" for name in ("zarr", "numpy"))
    terminalreporter.write_line(f"ran on Python {platform.python_version()}, {held}")
