"""The operations of a training step: one interface, three backends that agree.

`reference` is plain torch and the specification; `cpu` screens in low precision and loops over active features in
numba; `triton` does the same on a CUDA device. `autograd` makes them differentiable.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = {"reference": "sae.kernels.reference", "cpu": "sae.kernels.cpu", "triton": "sae.kernels.triton_backend"}

FASTEST = {"cpu": ("cpu", "numba"), "cuda": ("triton", "triton")}  # device: its fastest kernels, the package they need


def choose(name: str = "auto", device: str | torch.device = "cpu") -> ModuleType:
    """The kernels of that name; `auto` takes the fastest that run on the device.

    The environment variable SAE_KERNELS replaces `auto`. Raises: ValueError for an unknown name, or for kernels that
    cannot run on this device.
    """
    name = os.environ.get("SAE_KERNELS") or "auto" if name == "auto" else name
    if name == "auto":
        return fastest(device)
    kind = torch.device(device).type
    if name not in BACKENDS:
        raise ValueError(f"no kernels {name!r}; choose from auto, {', '.join(BACKENDS)}.")
    if name == "cpu" and kind != "cpu":
        raise ValueError(f"the cpu kernels run on a CPU, the tensors are on {device}. Use --kernels auto.")
    if name == "cpu" and not _installed("numba"):
        raise ValueError("the cpu kernels need numba: pip install numba, or use --kernels reference.")
    if name == "triton" and not _installed("triton"):
        raise ValueError(
            "the triton kernels need triton, which comes with torch for CUDA on Linux. Use --kernels auto."
        )
    if name == "triton" and kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the triton kernels run on a CUDA device, the tensors are on {device}. Use --device cuda, or "
            "--kernels auto."
        )
    return importlib.import_module(BACKENDS[name])


def fastest(device: str | torch.device = "cpu") -> ModuleType:
    """The fastest kernels that run on the device; ignores SAE_KERNELS."""
    name, needs = FASTEST.get(torch.device(device).type, ("reference", "torch"))
    return importlib.import_module(BACKENDS[name if _installed(needs) else "reference"])


def device_named(name: str = "auto") -> torch.device:
    """The device a dictionary is trained and run on: `auto` is a CUDA device if one is available, else the CPU.

    Raises: ValueError for cuda without a CUDA device, and for any other name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"a dictionary runs on cpu or cuda, not on {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here (torch.cuda.is_available() is false). Use --device cpu.")
    return torch.device(name)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
