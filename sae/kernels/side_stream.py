"""Copies that run beside the computation: a CUDA stream of their own. On other devices everything happens at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """A stream for copies from and to one device. What is asked of it happens in the order of asking."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def used(self) -> Iterator[None]:
        """What is launched inside the block is launched on this stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def follow(self) -> None:
        """What comes on this stream waits for what the caller has launched so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def precede(self) -> None:
        """What the caller launches from now on waits for what this stream has been asked so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def finish(self) -> None:
        """Blocks until this stream has done everything."""
        if self._stream is not None:
            self._stream.synchronize()

    def share(self, tensor: Tensor) -> Tensor:
        """A tensor made on this stream whose memory is not given away while the caller's stream still uses it."""
        if self._stream is not None:
            tensor.record_stream(torch.cuda.default_stream(self.device))
        return tensor


def page_locked(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory from which a CUDA device copies without blocking the program; on others as it is."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
