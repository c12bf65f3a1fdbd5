"""The `sae` command in separate processes, which can be killed: forked from a process that has loaded it already.

Importing torch takes seconds in each new process; a fork is the same program, and a kill stops it in the same way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch


def _run(arguments: list[str], log: str, save_minutes: float | None) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    os.fsync = lambda handle: None  # a killed process loses nothing that it wrote; only a loss of power does

    from sae.cli import main
    from sae.training import loop

    torch.set_num_threads(1)
    if save_minutes is not None:
        assert loop.train.__kwdefaults__ is not None
        loop.train.__kwdefaults__["save_minutes"] = save_minutes
    sys.exit(main(arguments))


class Commands:
    """Starts `sae ARGUMENTS` and waits for it, or for the moment to send it a signal."""

    def __init__(self, log: Path) -> None:
        self.log = log
        os.environ["OMP_NUM_THREADS"] = "1"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["preloaded", "commands"])
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(paths)}):  # the server does not get our sys.path
            forkserver.ensure_running()

    def start(self, *arguments: object, save_minutes: float | None = None) -> BaseProcess:
        process = self._context.Process(
            target=_run, args=([str(a) for a in arguments], str(self.log), save_minutes), daemon=True
        )
        process.start()
        return process

    def run(self, *arguments: object) -> int:
        process = self.start(*arguments)
        process.join(300)
        assert process.exitcode is not None, f"sae {arguments} is still running:\n{self.log.read_text()[-2000:]}"
        return process.exitcode

    def stop(
        self,
        number: signal.Signals,
        when: Callable[[], bool],
        *arguments: object,
        save_minutes: float | None = None,
        after_s: float = 0.0,
    ) -> int:
        """Runs until `when` holds, and `after_s` more, then sends the signal; its exit status (−9 for SIGKILL).

        Fails if the process ended by itself: then the signal tested nothing.
        """
        process = self.start(*arguments, save_minutes=save_minutes)
        deadline = time.monotonic() + 300
        while not when():
            assert process.is_alive(), f"sae {arguments} ended too early:\n{self.log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"sae {arguments} missed the moment:\n{self.log.read_text()[-2000:]}"
            time.sleep(0.001)
        time.sleep(after_s)
        assert process.is_alive(), f"sae {arguments} ended before the signal"
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(300)
        assert process.exitcode is not None
        return process.exitcode
