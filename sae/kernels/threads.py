"""Runs the loops of the CPU backend on as many threads as torch uses."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch


def threads() -> int:
    return torch.get_num_threads()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="kernels")


def in_parallel(work: Callable[[int, int], None], spans: list[tuple[int, int]]) -> None:
    if threads() == 1 or len(spans) == 1:
        for span in spans:
            work(*span)
    else:
        for done in [_pool(threads()).submit(work, *span) for span in spans]:
            done.result()


def in_chunks(n: int, work: Callable[[int, int], None]) -> None:
    """Calls `work(start, stop)` for even parts of range(n), on torch's number of threads."""
    parts = 1 if threads() == 1 or n < 64 else 4 * threads()
    cuts = np.linspace(0, n, parts + 1).astype(int)
    in_parallel(work, list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)))
