"""The screening product of the CPU backend: the format of its factors, and how far its values may be from exact ones.

bfloat16 and float32 factors are multiplied as they are. An int8 factor is a row of whole numbers −127 … 127 and one
float32 `unit` for the row; their products are whole numbers without any rounding. All bounds are derived in
`screening_bound.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels import cpu_loops, matmul
from sae.kernels.cpu_loops import GROUP
from sae.kernels.processor import instructions_of_onednn
from sae.kernels.sparsity import PreparedEncoder
from sae.kernels.threads import in_chunks

# Rows are screened in blocks of about SCREEN_VALUES values, within these limits of rows. Blocks are large because every
# product wakes torch's threads, which then compete with those of the loops.
SCREEN_VALUES, SCREEN_ROWS = 1 << 24, (1024, 4096)

# See screening_bound.md for these.
FLOAT32_ROUNDING = 2.0**-24
FLOAT32_SMALLEST = 2.0**-126
BFLOAT16_STORE_ROUNDING = 2.0**-8
BIAS_ROUNDINGS = 8
LARGEST_PRODUCT = 1e37
INT8_D_IN = range(2, (1 << 17) + 1)  # 127² d_in < 2³¹; with 1, PyTorch 2.13 reads other memory than the factors


# --- which format ----------------------------------------------------------------------------------------------------


def screen_dtype() -> torch.dtype:
    """bfloat16 on processors that multiply it directly, int8 on the others with AVX-512 VNNI, else float32.

    Only the time depends on this, not what is selected. AVX512_BF16 (which processors with AMX have too) makes bfloat16
    1.9 to 2.6 times as fast as the best float32 product (EPYC Zen 4 and Zen 5); without it PyTorch emulates bfloat16,
    3 times as slow as float32. int8 products with AVX512_VNNI are 4 times as fast as float32 (EPYC Zen 4).
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch.float32
    if "avx512_bf16" in instructions_of_onednn():
        return torch.bfloat16
    has_vnni = "avx512_vnni" in instructions_of_onednn()
    return torch.int8 if has_vnni and int8_products_are_exact() else torch.float32


@cache
def int8_products_are_exact() -> bool:
    """Whether PyTorch adds the largest products of int8 numbers without saturation.

    Without VNNI, oneDNN's sums of two products saturate at 16 bits.
    """
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(largest, sign * largest.t()) == sign * 64 * 127**2).all()) for sign in (1, -1))


def describe() -> str:
    """The format of the product, and why."""
    reasons = {
        torch.bfloat16: "a bfloat16 product (this processor multiplies bfloat16 directly: avx512_bf16)",
        torch.int8: "an int8 product (this processor has avx512_vnni and no avx512_bf16)",
        torch.float32: "a float32 product (this processor has neither avx512_bf16 nor avx512_vnni, so narrower "
        "products may be slower)",
    }
    return reasons[screen_dtype()]


# --- the encoder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Factor:
    """Rows a, rounded to â = `numbers · unit`, and for each `norm ≥ max(‖a‖, ‖â‖)` and `error ≥ ‖a − â‖`.

    `unit` is None, which means 1, except for int8.
    """

    numbers: Tensor
    unit: np.ndarray | None
    norm: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"], dtype: torch.dtype, padded: int | None = None) -> Factor:
        """The rows in this format, followed by zero rows up to `padded` rows."""
        n, d = rows.shape
        numbers = torch.zeros((padded or n, d), dtype=dtype) if padded else torch.empty((n, d), dtype=dtype)
        norm, error = np.zeros(len(numbers), np.float32), np.zeros(len(numbers), np.float32)
        if dtype == torch.int8:
            unit = np.ones(len(numbers), np.float32)
            whole = rows.numpy(), numbers.numpy()
            in_chunks(n, lambda a, b: cpu_loops.round_to_int8(*whole, unit, a, b, norm, error))
            return cls(numbers, unit, norm, error)
        numbers[:n] = rows
        arrays = rows.numpy(), _bits(numbers)
        in_chunks(n, lambda a, b: cpu_loops.norms_and_errors(*arrays, a, b, norm, error))
        return cls(numbers, None, norm, error)


@dataclass(frozen=True, eq=False)
class ScreeningEncoder(PreparedEncoder):
    """Features as rows, exact and rounded; the rounded ones are padded with zero rows to a multiple of GROUP."""

    rows: Float[Tensor, "d_sae d_in"]
    rounded: Factor


def prepare(W_enc: Float[Tensor, "d_in d_sae"]) -> ScreeningEncoder:
    """The encoder's rows, rounded for the screening product, and their norms and rounding errors."""
    return prepare_in(screen_dtype(), W_enc)


def prepare_in(dtype: torch.dtype, W_enc: Float[Tensor, "d_in d_sae"]) -> ScreeningEncoder:
    """As `prepare`, for a screen of this format; float32 if int8 does not fit the length of the rows."""
    rows = W_enc.detach().t().float().contiguous()  # no copy for an `SAE`, which stores W_enc feature by feature
    if dtype == torch.int8 and len(W_enc) not in INT8_D_IN:
        dtype = torch.float32
    return ScreeningEncoder(W_enc, rows, Factor.of(rows, dtype, -(-len(rows) // GROUP) * GROUP))


# --- the product of a batch ------------------------------------------------------------------------------------------


def _with_error_share(x: Factor) -> tuple[np.ndarray, np.float32]:
    """Norms, and one share of them for all rows, with ‖row‖ ≤ norm and ‖row − rounded row‖ ≤ share · norm.

    The share is that of the rows of ordinary length; a short row whose rounding takes a larger one counts as longer.
    """
    ordinary = x.norm >= np.float32(1e-3) * x.norm.max(initial=0)
    with np.errstate(all="ignore"):  # rows with NaN are screened by nobody
        share = np.float32(1.00001) * (x.error[ordinary] / x.norm[ordinary]).max(initial=1e-30)
        return np.maximum(x.norm, np.float32(1.00001) * x.error / share), np.float32(share)


@dataclass
class Screen:
    """The screening product of a batch, and how far its values may be from the exact ones (`screening_bound.md`, §4).

    With s = product · x.unit · weights.unit and exact = the float32 pre-activation:
    `|exact − threshold − (s + base)| ≤ x_norm · margin + x_error · norm + rounding · |s| + doubt`, where
    base = bias − threshold; margin, norm, base and doubt have one number per feature.
    """

    x: Factor
    weights: Factor
    buffer: Tensor  # takes the product of a block of rows
    arrays: tuple[Any, ...]  # the arguments of `cpu_loops.choose` after the product
    is_finite: bool  # no number is NaN or infinite, and no product can become infinite

    @classmethod
    def of(cls, x: Float[Tensor, "rows d_in"], encoder: ScreeningEncoder, bias: Tensor, threshold: Tensor) -> Screen:
        weights = encoder.rounded
        (padded, d_in), dtype = weights.numbers.shape, weights.numbers.dtype
        rounded = Factor.of(x, dtype)
        margin = np.float32(sum_rounding(d_in, dtype)) * weights.norm + weights.error
        base, doubt = np.full(padded, cpu_loops.LEAST, np.float32), np.zeros(padded, np.float32)
        base[: len(bias)] = np.clip((bias - threshold).detach().numpy(), cpu_loops.LEAST, -cpu_loops.LEAST)
        magnitude = (bias.abs() + threshold.abs()).detach().numpy()
        magnitude = np.nan_to_num(magnitude, posinf=0.0)  # of infinite ones `base` is enough
        doubt[: len(bias)] = BIAS_ROUNDINGS * FLOAT32_ROUNDING * magnitude + (2 * d_in + 8) * FLOAT32_SMALLEST
        rounding = np.float32(BFLOAT16_STORE_ROUNDING if dtype == torch.bfloat16 else 0.0)
        out_dtype = torch.int32 if dtype == torch.int8 else dtype
        buffer = torch.empty((screen_rows(len(x), padded), padded), dtype=out_dtype)
        x_norm, x_error = rounded.norm, rounded.error
        if dtype != torch.int8:
            x_norm, share = _with_error_share(rounded)
            x_error, margin = np.zeros_like(x_error), margin + share * weights.norm
        units = rounded.unit, weights.unit
        arrays = (*units, x_norm, x_error, weights.norm, margin, base, doubt, rounding)
        largest = float(rounded.norm.max(initial=0)) * float(weights.norm.max(initial=0))  # of NaN and others: NaN
        return cls(rounded, weights, buffer, arrays, largest < LARGEST_PRODUCT and not np.isnan(base).any())

    def product(self, start: int, stop: int) -> np.ndarray:
        """The products of rows start … stop − 1: whole numbers, or floats as bits."""
        rows, columns, out = self.x.numbers[start:stop], self.weights.numbers.t(), self.buffer[: stop - start]
        if rows.dtype == torch.int8:
            return torch._int_mm(rows, columns, out=out).numpy()
        with matmul.using(matmul.choose("auto")):
            return _bits(torch.mm(rows, columns, out=out))


def sum_rounding(d_in: int, dtype: torch.dtype) -> float:
    """A bound on the errors of summation, as a share of ‖x‖ ‖w‖: of the exact product, the screen and the norms."""
    return ((3.0 if dtype == torch.int8 else 2.25) * d_in + 64) * FLOAT32_ROUNDING


def screen_rows(n_rows: int, d_sae: int) -> int:
    """How many rows are screened at once."""
    least, most = SCREEN_ROWS
    return min(max(SCREEN_VALUES // d_sae, least), most, max(1, n_rows))


def _bits(tensor: Tensor) -> np.ndarray:
    """The bits of the numbers as unsigned integers, since numpy has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy().view(np.uint32)
