"""Which instruction sets the processor has. Rules that depend on the hardware read these names and never a clock."""

from __future__ import annotations

import os
from functools import cache

import torch


@cache
def instructions() -> frozenset[str]:
    """Names of the instruction sets, as `torch.cpu.get_capabilities` spells them: avx2, avx512_bf16, amx_tile, …"""
    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    older = {  # before PyTorch 2.10
        "avx2": torch.cpu._is_avx2_supported,
        "avx512_f": torch.cpu._is_avx512_supported,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
        "avx512_vnni": torch.cpu._is_vnni_supported,
        "amx_tile": torch.cpu._is_amx_tile_supported,
    }
    return frozenset(name for name, supported in older.items() if supported())


BELOW_VNNI = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
)  # values of oneDNN's ONEDNN_MAX_CPU_ISA


def instructions_of_onednn() -> frozenset[str]:
    """`instructions`, without bfloat16 and VNNI where oneDNN's own limit (ONEDNN_MAX_CPU_ISA) forbids their use."""
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    forbidden = {"avx512_bf16"} if limit in (*BELOW_VNNI, "AVX512_CORE_VNNI") else set()
    return instructions() - forbidden - ({"avx512_vnni"} if limit in BELOW_VNNI else set())
