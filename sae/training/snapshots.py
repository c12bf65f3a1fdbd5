"""Saves a state while training goes on: a copy in page-locked memory, which a thread of its own writes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from sae.kernels.side_stream import SideStream

Tensors = dict[str, Tensor]


class Snapshots:
    """Copies tensors from a device one snapshot after another, and writes each in the background.

    The program does not wait for a copy; later kernels do, so that they change nothing that is being copied. The memory
    of the host holds one snapshot, page-locked as far as the system allows.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = SideStream(device)
        self._copies: Tensors = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._writing: Future[None] | None = None

    def take(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        """Copies the tensors as they are now, and has `write` called with the copies.

        Waits for the snapshot before. Raises: what writing that one raised.
        """
        self.wait()
        self._side.follow()
        with self._side.used():
            for name, tensor in tensors.items():
                if name not in self._copies:
                    self._copies[name] = _memory_for(tensor)
                self._copies[name].copy_(tensor.detach(), non_blocking=True)
        self._side.precede()
        self._writing = self._writer.submit(self._write, write)

    def wait(self) -> None:
        """Returns when the last snapshot is written. Raises: what writing it raised, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits, and frees the memory."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._copies = {}

    def _write(self, write: Callable[[Tensors], None]) -> None:
        self._side.finish()
        write(self._copies)


def _memory_for(tensor: Tensor) -> Tensor:
    """Memory of the host in the order of the tensor's own, from which a device copies without a detour."""
    try:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
        )
    except RuntimeError:  # the system does not lock that much: copying then takes longer
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
