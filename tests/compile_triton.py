"""Compiles every Triton kernel for two GPUs, without one, and prints a line for each: `test_triton` runs it.

It runs in a separate process, because the tests' kernels are made for the interpreter. Numbers of type i64, which only
very large inputs have, are left to the GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae.kernels import triton_adam, triton_products, triton_screen, triton_select

CAPABILITIES = (80, 90)  # A100, H100
ONE = 1  # a stride that is one is compiled in

f16, f32, i8, i32, i64 = "*fp16", "*fp32", "*i8", "*i32", "*i64"
NARROW = [f32, f32, f32]
BOUNDS = [f32, f32, "fp32"]
SIZES = ["i32"] * 5
BLOCK = {"ROWS": 128, "FEATURES": 128, "INPUTS": 64}

# kernel, types of its arguments (a number or None: compiled in), constants
KERNELS: list[tuple[Any, list[Any], dict[str, Any]]] = [
    (triton_screen._narrow, [f32, "i32", ONE, f16, *NARROW, "i32", "i32"], {"ROWS": 4, "COLUMNS": 512}),
    (triton_screen._narrow, ["*bf16", "i32", "i32", f16, *NARROW, "i32", "i32"], {"ROWS": 1, "COLUMNS": 4096}),
    (
        triton_screen._screen,
        [f16, *NARROW, f16, *NARROW, *BOUNDS, f32, i32, None, None, *SIZES, "fp32"],
        {"KEEP": False, "GROUP": 1, **BLOCK},
    ),
    (
        triton_screen._screen,
        [f16, *NARROW, f16, *NARROW, *BOUNDS, None, None, f16, f32, *SIZES, "fp32"],
        {"KEEP": True, "GROUP": 32, **BLOCK},
    ),
    (
        triton_screen._mark,
        [f16, *NARROW, *NARROW, *BOUNDS, f32, i32, *["i32"] * 3, *["fp32"] * 3],
        {"ROWS": 1, "WORDS": 128},
    ),
    (triton_screen._count, [i32, i32, *["i32"] * 3], {"ROWS": 1, "WORDS": 128}),
    (triton_screen._list, [i32, i64, i32, *["i32"] * 3], {"ROWS": 1, "WORDS": 128}),
    (triton_select._keep_largest, [f32, i64, i8, "i32", "i32"], {"ROWS": 4, "ROOM": 128}),
    (
        triton_products._dots,
        [f32, "i32", ONE, f32, "i32", ONE, i64, i32, f32, "i32", "i32"],
        {"ENTRIES": 16, "COLUMNS": 128},
    ),
    *(
        (
            triton_products._sum_rows,
            [f32, i32, i32, i64, source, "i32", ONE, f32, "i32", ONE, "i32"],
            {"ADD": add, "ENTRIES": 8, "COLUMNS": 512},
        )
        for add, source in ((False, f32), (True, f32), (False, "*bf16"))
    ),
    (triton_adam._adam_flat, [*[f32] * 4, *["fp32"] * 6, "i32"], {"NUMBERS": 1024}),
    (triton_adam._adam_unit_rows, [*[f32] * 4, *["fp32"] * 6, "i32"], {"COLUMNS": 512}),
]


def compiled(kernel: Any, types: list[Any], constants: dict[str, Any], capability: int) -> bytes:
    """The machine code for a GPU of that compute capability."""
    named = dict(zip(kernel.arg_names, types, strict=False))
    held = {name: kind for name, kind in named.items() if not isinstance(kind, str)} | constants
    signature = named | dict.fromkeys(held, "constexpr")
    assert set(signature) == set(kernel.arg_names), f"{kernel.__name__}: {set(kernel.arg_names) ^ set(signature)}"
    source = ASTSource(fn=kernel, signature=signature, constexprs=held)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["cubin"]


def main() -> int:
    written = {kernel.__name__ for kernel, _, _ in KERNELS}
    modules = (triton_adam, triton_products, triton_screen, triton_select)
    launched = {
        value.__name__
        for module in modules
        for value in vars(module).values()
        if isinstance(value, triton.JITFunction) and value.__name__ not in HELPERS
    }
    if launched != written:
        print(f"not compiled here: {launched ^ written}", file=sys.stderr)
        return 1
    for capability in CAPABILITIES:
        for kernel, types, constants in KERNELS:
            print(f"sm_{capability} {kernel.__name__} {len(compiled(kernel, types, constants, capability))} bytes")
    return 0


HELPERS = {"moved", "_slack", "_packed", "_unpacked"}  # called by kernels, never launched

if __name__ == "__main__":
    sys.exit(main())
