"""Which products multiply dense float32 matrices on this CPU: chosen by a probe of speed and error, named, switched.

`highest` is PyTorch's default. `medium` lets PyTorch use oneDNN, which on some processors (AMD's) multiplies in float32
and runs twice as fast, and on others (with AMX) rounds to bfloat16: so `auto` takes it only where its error is
float32's. `bf16` rounds the factors and results of a dictionary's dense products to bfloat16 (relative error 3e-3) on
every processor, and is `medium` in all others; sums, weights and what is chosen sparsely stay float32. The names are
those of `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels import buffers

NAMES = ("auto", "highest", "medium", "bf16")
FLOAT32_ERROR = 2e-6  # relative, of a product over 512 terms; bfloat16's is about 3e-3
# Times as fast as `highest`: measured 1.1 to 2 where the error is float32's. The bound lies where no processor is known
# to be, because two runs of one command must take the same products however busy the machine is.
WORTH = 0.75
PROBE_ROUNDS = 8

_turn = threading.RLock()
_narrow = False  # whether `product` rounds its factors to bfloat16


@dataclass(frozen=True)
class Probe:
    """Processor seconds and relative errors of the same products by each back end, and the seconds of bfloat16's."""

    seconds: dict[str, float]
    error: dict[str, float]
    bfloat16_s: float

    @property
    def best(self) -> str:
        """`medium` where its error is float32's, unless it is clearly slower."""
        exact = self.error["medium"] <= FLOAT32_ERROR
        return "medium" if exact and self.speedup >= WORTH else "highest"

    @property
    def speedup(self) -> float:
        return self.seconds["highest"] / self.seconds["medium"]

    @property
    def bfloat16_speedup(self) -> float:
        """Of bfloat16 tensors over the best float32 product."""
        return self.seconds[self.best] / self.bfloat16_s


@cache
def probe() -> Probe:
    """Measures once, in under a second: an encoder's product and a weight gradient's."""
    generator = torch.Generator().manual_seed(0)
    x, f, W = factors = tuple(
        torch.randn(shape, generator=generator) for shape in ((512, 512), (512, 2048), (2048, 512))
    )
    exact = torch.cat([x.double() @ W.double().t(), (f.double().t() @ x.double()).t()])
    narrow = tuple(factor.bfloat16() for factor in factors)
    error, seconds = {}, {"highest": torch.inf, "medium": torch.inf, "bfloat16": torch.inf}
    # In turn and by the processor's time, so that what else the machine does decides nothing.
    for _ in range(PROBE_ROUNDS):
        for name in seconds:
            with using("highest" if name == "bfloat16" else name):
                x, f, W = narrow if name == "bfloat16" else factors
                started = time.process_time()
                found = x @ W.t(), f.t() @ x
                seconds[name] = min(seconds[name], time.process_time() - started)
            error[name] = ((torch.cat([found[0], found[1].t()]) - exact).norm() / exact.norm()).item()
    return Probe(seconds, error, seconds.pop("bfloat16"))


def choose(name: str, device: str | torch.device = "cpu") -> str:
    """`name`, or what the probe finds best for `auto`. Raises: ValueError for a name that is none."""
    if name not in NAMES:
        raise ValueError(f"no matrix products {name!r}; there are {', '.join(NAMES)}.")
    if name != "auto":
        return name
    return probe().best if torch.device(device).type == "cpu" else "highest"


def resumed(name: str, asked: str) -> str:
    """The products a run began with; others, with a warning, where `auto` chose them on a machine unlike this one."""
    if asked == "auto" and name == "medium" and probe().error["medium"] > FLOAT32_ERROR:
        warnings.warn(
            f"this run began with {name} products, whose relative error here is {probe().error[name]:.0e}: it goes on "
            "with highest, and so not bit for bit as on the machine it began on.",
            stacklevel=2,
        )
        return "highest"
    return name


def describe() -> str:
    """What `auto` takes here, and why."""
    found = probe()
    return (
        f"{found.best} (medium runs {found.speedup:.1f} times as fast as highest here, relative error "
        f"{found.error['medium']:.0e} against {found.error['highest']:.0e}; bfloat16 tensors "
        f"{found.bfloat16_speedup:.1f} times as fast as {found.best})"
    )


@contextmanager
def using(name: str) -> Iterator[None]:
    """Multiplies with these products inside. PyTorch keeps the choice for all threads, so they take turns in here."""
    global _narrow
    with _turn:
        before = torch.get_float32_matmul_precision(), _narrow
        torch.set_float32_matmul_precision("highest" if name == "highest" else "medium")
        _narrow = name == "bf16"
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            _narrow = before[1]


def factor(a: Tensor) -> Tensor:
    """`a` as `product` multiplies it; convert here what takes part in several products."""
    if not _narrow or a.dtype != torch.float32:
        return a
    if not a.is_contiguous() and a.t().is_contiguous():
        return factor(a.t()).t()
    return buffers.empty(*a.shape, like=a.new_empty(0, dtype=torch.bfloat16)).copy_(a)


def product(out: Float[Tensor, "n m"], a: Float[Tensor, "n d"], b: Float[Tensor, "d m"]) -> Tensor:
    """`out = a b`."""
    a, b = factor(a), factor(b)
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(_narrow_product(a, b))


def add_product_(out: Float[Tensor, "n m"], a: Float[Tensor, "n d"], b: Float[Tensor, "d m"]) -> Tensor:
    """`out += a b`."""
    a, b = factor(a), factor(b)
    return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(_narrow_product(a, b))


def _narrow_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=buffers.empty(len(a), b.shape[1], like=a))
