"""A fixed-shape step as a CUDA graph, or two around what is outside of it: the host asks for all launches at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from sae.kernels.triton_step import WARMING_UP
from sae.kernels.triton_step.buffers import Exchange
from sae.kernels.triton_step.step import FixedStep

WARM_UPS = 2


class Launches(Protocol):
    """The launches of one step: the same ones with the same arguments every time."""

    @property
    def buffers(self) -> Exchange: ...

    def run(self) -> None: ...


def captured(step: Launches) -> Callable[[], None]:
    """A function that takes the step: on a CUDA device it replays a graph, elsewhere it runs the launches one by one.

    Kernels are compiled and the product's library starts before the capture, in steps that are halted from the
    beginning and therefore change nothing. What is outside of the step is not captured.
    """
    if step.buffers.flags.device.type != "cuda":
        return step.run
    outside = step.outside if isinstance(step, FixedStep) else None
    parts = (step.reconstruct, step.learn) if isinstance(step, FixedStep) and outside else (step.run,)
    step.buffers.flags.fill_(WARMING_UP)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            for part in parts:
                part()
    torch.cuda.current_stream().wait_stream(side)
    step.buffers.flags.zero_()
    graphs = [_graph_of(part) for part in parts]
    if not (isinstance(step, FixedStep) and outside):
        return graphs[0]
    held, run_outside = step.buffers, outside

    def replay() -> None:
        graphs[0]()
        run_outside(held)
        graphs[1]()

    return replay


def _graph_of(launches: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may pin rows meanwhile
        launches()
    return graph.replay
