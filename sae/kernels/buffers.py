"""Reuses the memory of large tensors that are no longer used: new pages cost more time than the arithmetic."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

POOLED_BYTES = 1 << 20


@dataclass
class Block:
    """Memory, and a weak reference to the array that every tensor in it keeps alive."""

    memory: np.ndarray
    holder: weakref.ref[np.ndarray]


_blocks: list[Block] = []
_lock = Lock()


def empty(*shape: int, like: Tensor) -> Tensor:
    """`torch.empty`, in the memory of a freed tensor of the same size in bytes if there is one.

    Every alias of a tensor keeps its memory. If none fits, free memory of other sizes is returned to the system.
    """
    n_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or n_bytes < POOLED_BYTES:  # PyTorch pools GPU memory itself
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    with _lock:
        free = [block for block in _blocks if block.holder() is None]
        fitting = [block.memory for block in free if block.memory.nbytes == n_bytes]
        if not fitting:
            _blocks[:] = [block for block in _blocks if block.holder() is not None]
            fitting = [np.empty(n_bytes, np.uint8)]
        memory = fitting[0]
        holder = memory[:]
        _blocks[:] = [block for block in _blocks if block.memory is not memory]
        _blocks.append(Block(memory, weakref.ref(holder)))
    return torch.from_numpy(holder).view(like.dtype).view(shape)
