"""A fixed-shape step as one CUDA graph: the host asks for all of its launches at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from sae.kernels.triton_step import WARMING_UP
from sae.kernels.triton_step.buffers import Exchange

WARM_UPS = 2


class Launches(Protocol):
    """The launches of one step: the same ones with the same arguments every time."""

    @property
    def buffers(self) -> Exchange: ...

    def run(self) -> None: ...


def captured(step: Launches) -> Callable[[], None]:
    """A function that takes the step: on a CUDA device it replays a graph, elsewhere it runs the launches one by one.

    Kernels are compiled and the product's library starts before the capture, in steps that are halted from the
    beginning and therefore change nothing.
    """
    if step.buffers.flags.device.type != "cuda":
        return step.run
    step.buffers.flags.fill_(WARMING_UP)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    step.buffers.flags.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may pin rows meanwhile
        step.run()
    return graph.replay
