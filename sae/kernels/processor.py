"""Which instruction sets the processor has. Rules that depend on the hardware read these names and never a clock."""

from __future__ import annotations

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
        "amx_tile": torch.cpu._is_amx_tile_supported,
    }
    return frozenset(name for name, supported in older.items() if supported())
