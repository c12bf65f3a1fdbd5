"""The type in which the encoder's product is computed: float16, a screen, or bfloat16, the product that counts."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_type_of(pointer, x):
    """Float32 numbers in the type that is stored there, rounded to the nearest.

    bfloat16 is rounded by hand, because Triton's interpreter cuts its last bits off.
    """
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def rounding(screened, value):
    """How far a screened value may be off by its own rounding.

    A product in float16 stands for one in float32. One in bfloat16 stands for itself: that is `--precision bf16`.
    """
    return tl.zeros_like(value) if screened.dtype.element_ty == tl.bfloat16 else tl.abs(value) * 2.0**-11
