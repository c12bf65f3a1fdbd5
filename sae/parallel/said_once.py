"""One message for an error that all ranks find before they join, such as a wrong setting."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from sae.jobs.ranks import rank_and_world

WAIT_S = 3.0  # for rank 0 to find the same error


def said_by_another(message: str) -> bool:
    """Whether another rank has this message printed: rank 0 if it finds the same error in time, else the first to ask.

    Ranks find each other through the store that torchrun keeps; False without it, and once they have joined, where
    `sae.parallel.launch` sees to it.
    """
    rank, world = rank_and_world()
    if world == 1 or dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=WAIT_S)
        kept = TCPStore(where, port, is_master=False, timeout=wait, wait_for_workers=False)
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"sae/said/{start}/{sha256(message.encode()).hexdigest()}", kept)
        if rank:
            with suppress(RuntimeError):  # rank 0 did not find it
                store.wait(["first"], wait)
        said: bool = store.add("said", 1) > 1
        if not rank:
            store.set("first", "1")
        return said
    except (RuntimeError, ValueError, OSError, KeyError):  # each rank then speaks for itself
        return False
