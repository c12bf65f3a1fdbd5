"""What torchrun told this process through its environment; quick to import, unlike torch.distributed."""

from __future__ import annotations

import os


def rank_and_world() -> tuple[int, int]:
    """This process' number among those that torchrun started, and how many they are; 0 and 1 without torchrun."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def is_first_rank() -> bool:
    """Whether this process is the one that prints results; so is the only one."""
    return rank_and_world()[0] == 0
