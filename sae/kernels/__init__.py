"""The operations a training step is made of: one interface, two implementations that agree.

`reference` is plain torch and the specification; `cpu` screens in bfloat16 and loops over active features in numba.
`ops` makes them differentiable.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = {"reference": "sae.kernels.reference", "cpu": "sae.kernels.cpu"}


def choose(name: str = "auto", device: str | torch.device = "cpu") -> ModuleType:
    """The kernels of that name; `auto` takes the fastest that run on the device.

    The environment variable SAE_KERNELS stands in for `auto`. Raises: ValueError for a name that is none, or kernels
    that cannot run here.
    """
    name = os.environ.get("SAE_KERNELS") or "auto" if name == "auto" else name
    if name == "auto":
        name = "cpu" if torch.device(device).type == "cpu" and _installed("numba") else "reference"
    if name not in BACKENDS:
        raise ValueError(f"no kernels {name!r}; there are auto, {', '.join(BACKENDS)}.")
    if name == "cpu" and torch.device(device).type != "cpu":
        raise ValueError(f"the cpu kernels run on a CPU, the tensors are on {device}. Say --kernels auto.")
    if name == "cpu" and not _installed("numba"):
        raise ValueError("the cpu kernels need numba: pip install numba, or say --kernels reference.")
    return importlib.import_module(BACKENDS[name])


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
