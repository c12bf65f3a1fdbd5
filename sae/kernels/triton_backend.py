"""The CUDA backend, written in Triton: what `sae.kernels.reference` specifies, at the cost of the active features.

Only the encoder's product is dense. It is a float16 product that screens (`triton_screen`); all results are float32.
"""

from __future__ import annotations

import torch

from sae.kernels.compiler_cache import choose_triton_directory
from sae.kernels.triton_adam import adam_
from sae.kernels.triton_products import add_by_feature_, combine, dots, sum_by_feature
from sae.kernels.triton_select import interpreted, prepare, select

__all__ = ["NAME", "adam_", "add_by_feature_", "combine", "describe", "dots", "prepare", "select", "sum_by_feature"]

NAME = "triton"
choose_triton_directory()  # before the first kernel is compiled


def describe() -> str:
    """What runs, and why."""
    where = "in Triton's interpreter, for tests" if interpreted() else f"on {torch.cuda.get_device_name()}"
    return f"active features in Triton kernels {where}, screened by a float16 product"
