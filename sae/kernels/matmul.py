"""How dense float32 matrices are multiplied: by name, chosen by a rule on the hardware, switched with `using`.

- `highest`: PyTorch's default, float32.
- `medium`: PyTorch may use oneDNN. What that computes depends on the processor:
  with AVX-512 alone it multiplies in float32 (relative error 4e-7 over 512 terms, `highest` has 2e-7) and runs 1.0 to
  2 times as fast as `highest` (docs/measurements/bench-step-cpu*.json: EPYC Zen 4 and Zen 5);
  with the instructions in `ROUNDING` it may round both factors to bfloat16 (relative error 3e-3);
  with neither PyTorch does not use oneDNN, and the products are those of `highest`.
- `bf16`: factors and results of a dictionary's dense products are rounded to bfloat16 (relative error 3e-3) on every
  processor; all other products are `medium`. Sums and weights stay float32, and so do the values of features that
  sparse kernels select.

`auto` never gives up float32 accuracy: it is `medium` on an x86 processor with AVX2 and nothing in `ROUNDING`, else
`highest`. On a GPU it is `highest`: `medium` would allow TF32 there (relative error 5e-4). The rule reads no clock, so
two runs of one command use the same products, however busy the machine is. A run records its choice and keeps it when
resumed.
The names are those of `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels import buffers
from sae.kernels.processor import instructions

NAMES = ("auto", "highest", "medium", "bf16")
ROUNDING = ("amx_tile", "amx_bf16", "avx10_2", "avx_ne_convert")  # with these oneDNN may multiply in bfloat16

_turn = threading.RLock()
_narrow = False  # whether `product` rounds its factors to bfloat16


def choose(name: str, device: str | torch.device = "cpu") -> str:
    """`name`, or for `auto` the fastest products with float32 accuracy. Raises: ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"no matrix products {name!r}; choose from {', '.join(NAMES)}.")
    if name != "auto":
        return name
    return "medium" if torch.device(device).type == "cpu" and _medium_is_float32() else "highest"


def resumed(name: str, asked: str) -> str:
    """The products that a run began with, except if `auto` chose them on a processor where they are more accurate.

    In that case warns and returns `highest`.
    """
    if asked == "auto" and name == "medium" and not _medium_is_float32():
        warnings.warn(
            f"this run began with {name} products, which may round to bfloat16 on this processor "
            f"({_rounding_here()}). It continues with highest, so its numbers will differ from those of the "
            "machine it began on.",
            stacklevel=2,
        )
        return "highest"
    return name


def describe(device: str | torch.device = "cpu") -> str:
    """What `auto` chooses on this machine, and why."""
    if torch.device(device).type != "cpu":
        return "highest (on a GPU, medium would round to TF32)"
    if not _medium_is_float32():
        return f"highest (medium may round to bfloat16 on this processor: {_rounding_here()})"
    if "avx512_f" in instructions():
        return f"medium (oneDNN in float32: this processor has AVX-512 and none of {', '.join(ROUNDING)})"
    return "medium (the same products as highest: this processor has no AVX-512, and PyTorch does not use oneDNN)"


def _medium_is_float32() -> bool:
    return "avx2" in instructions() and instructions().isdisjoint(ROUNDING)


def _rounding_here() -> str:
    found = [name for name in ROUNDING if name in instructions()]
    return f"it has {', '.join(found)}" if found else "it is not an x86 processor with AVX2"


@contextmanager
def using(name: str) -> Iterator[None]:
    """Multiplies with these products inside the block.

    PyTorch has one setting for all threads, so only one thread at a time is inside such a block.
    """
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
    """`a` in the type that `product` multiplies in; call it once for a matrix that takes part in several products."""
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
