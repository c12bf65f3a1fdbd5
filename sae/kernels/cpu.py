"""The CPU backend: one low-precision product finds the few candidates of each row, numba loops do the rest in float32.

The product only *screens*: a bound on its rounding errors says which features can be active, and only those get their
exact float32 dot product. So the result is the float32 result at the speed of the low-precision product. The bound is
derived in `screening_bound.md`. The loops run on as many threads as torch uses.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels import cpu_loops, matmul
from sae.kernels.batch_topk import batch_topk
from sae.kernels.cpu_loops import GROUP
from sae.kernels.processor import instructions
from sae.kernels.sparsity import Above, BatchTopK, ByFeature, NotSparse, PreparedEncoder, Rule, Support, TopK

NAME = "cpu"

# Rows are screened in blocks of about SCREEN_VALUES values, within these limits of rows. Blocks are large because every
# product wakes torch's threads, which then compete with those of the loops.
SCREEN_VALUES, SCREEN_ROWS = 1 << 24, (1024, 4096)

# A row has space for this share of the features, and for at least this number. If it needs more, dense is faster.
MAX_ACTIVE_SHARE = 1 / 4
MIN_ROW_SPACE = 64

# See screening_bound.md for these three.
FLOAT32_ROUNDING = 2.0**-24
BFLOAT16_STORE_ROUNDING = 2.0**-8
BIAS_ROUNDINGS = 8


def prepare(W_enc: Float[Tensor, "d_in d_sae"]) -> ScreeningEncoder:
    """The encoder's rows, rounded for the screening product, and their norms and rounding errors."""
    rows = W_enc.detach().t().float().contiguous()  # no copy for an `SAE`, which stores W_enc feature by feature
    d_sae, d_in = rows.shape
    rounded = torch.zeros((-(-d_sae // GROUP) * GROUP, d_in), dtype=screen_dtype())
    rounded[:d_sae] = rows
    return ScreeningEncoder(W_enc, rows, rounded, *_norms_and_errors(rows, rounded))


@dataclass(frozen=True, eq=False)
class ScreeningEncoder(PreparedEncoder):
    """Features w as rows, rounded to ŵ, and for each `norm = max(‖w‖, ‖ŵ‖)` and `error = ‖w − ŵ‖`.

    All but `rows` are padded with zero rows to a multiple of GROUP features.
    """

    rows: Float[Tensor, "d_sae d_in"]
    rounded: Float[Tensor, "padded d_in"]
    norm: np.ndarray
    error: np.ndarray


def select(
    x: Float[Tensor, "rows d_in"], encoder: PreparedEncoder, bias: Float[Tensor, " d_sae"], rule: Rule
) -> tuple[Support, Float[Tensor, " nnz"]]:
    """The active features of each row under `rule`, and their pre-activations `x · W_enc + bias` in float32.

    Raises: NotSparse if more than a quarter of the features pass in some row, or a number is not finite.
    """
    assert isinstance(encoder, ScreeningEncoder)
    match rule:
        case TopK(k):
            return _select(x, encoder, bias, min(k, len(bias)), torch.zeros_like(bias))
        case Above(threshold):
            return _select(x, encoder, bias, 0, threshold)
        case BatchTopK():
            return batch_topk(x, encoder, bias, rule, lambda threshold: _select(x, encoder, bias, 0, threshold))


def _select(x: Tensor, encoder: ScreeningEncoder, bias: Tensor, k: int, threshold: Tensor) -> tuple[Support, Tensor]:
    """The k largest entries of each row above the thresholds; all of them if k = 0."""
    x = x.detach().float().contiguous()
    n_rows, d_sae = len(x), len(encoder.rows)
    screen = Screen.of(x, encoder, bias, threshold)
    if not screen.is_finite:
        raise NotSparse("rows or weights are not finite")
    space = min(d_sae, k or max(MIN_ROW_SPACE, int(MAX_ACTIVE_SHARE * d_sae)))
    features, values = np.empty((n_rows, space), np.int32), np.empty((n_rows, space), np.float32)
    counts = np.zeros(n_rows, np.int64)
    exact = [_numpy(t.detach().float().contiguous()) for t in (x, encoder.rows, bias, threshold)]
    for first in range(0, n_rows, len(screen.buffer)):
        block = screen.product(first, min(n_rows, first + len(screen.buffer)))

        def choose(start: int, stop: int, block: np.ndarray = block, first: int = first) -> None:
            cpu_loops.choose(block, *screen.arrays, *exact, k, first, start, stop, features, values, counts)

        _in_chunks(len(block), choose)
    if (counts > space).any():
        raise NotSparse(f"more than {space:,} of {d_sae:,} features are active in a row")
    offsets = np.zeros(n_rows + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    flat_features, flat_values = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    _in_chunks(n_rows, lambda a, b: cpu_loops.compact(features, values, offsets, a, b, flat_features, flat_values))
    return Support(torch.from_numpy(flat_features), torch.from_numpy(offsets), d_sae), torch.from_numpy(flat_values)


@dataclass
class Screen:
    """The screening product of a batch, and how far its values may be from the exact ones (`screening_bound.md`, §4).

    `|exact − threshold − (screened + base)| ≤ x_norm · margin + rounding · |screened| + doubt`, where exact is the
    float32 pre-activation and base = bias − threshold; margin, base and doubt have one number per feature.
    """

    x: Tensor  # rounded
    weights: Tensor  # rounded and padded
    buffer: Tensor  # takes the product of a block of rows
    arrays: tuple[Any, ...]  # x_norm, margin, base, doubt, rounding, bit shift: the arguments of `cpu_loops.choose`

    @classmethod
    def of(cls, x: Tensor, encoder: ScreeningEncoder, bias: Tensor, threshold: Tensor) -> Screen:
        (padded, d_in), dtype = encoder.rounded.shape, encoder.rounded.dtype
        x_rounded = x.to(dtype)
        x_norm, x_error = _norms_and_errors(x, x_rounded)
        x_relative_error = (x_error / np.maximum(x_norm, np.float32(1e-30))).max(initial=0)
        margin = np.float32(x_relative_error + sum_rounding(d_in)) * encoder.norm + encoder.error
        base, doubt = np.full(padded, cpu_loops.LEAST, np.float32), np.zeros(padded, np.float32)
        base[: len(bias)] = np.clip(_numpy(bias - threshold), cpu_loops.LEAST, -cpu_loops.LEAST)
        magnitude = np.nan_to_num(_numpy(bias.abs() + threshold.abs()), posinf=0.0)  # of infinite ones `base` is enough
        doubt[: len(bias)] = BIAS_ROUNDINGS * FLOAT32_ROUNDING * magnitude
        rounding = np.float32(BFLOAT16_STORE_ROUNDING if dtype == torch.bfloat16 else 0.0)
        buffer = torch.empty((screen_rows(len(x), padded), padded), dtype=dtype)
        return cls(x_rounded, encoder.rounded, buffer, (x_norm, margin, base, doubt, rounding, _shift(dtype)))

    @property
    def is_finite(self) -> bool:
        x_norm, margin, base = self.arrays[:3]
        return bool(np.isfinite(x_norm).all() and np.isfinite(margin).all() and not np.isnan(base).any())

    def product(self, start: int, stop: int) -> np.ndarray:
        """The screened values of rows start … stop − 1, as bits."""
        with matmul.using(matmul.choose("auto")):
            return _bits(torch.mm(self.x[start:stop], self.weights.t(), out=self.buffer[: stop - start]))


def sum_rounding(d_in: int) -> float:
    """A bound on the error of the sums of two float32 dot products of d_in terms, as a share of ‖x‖ ‖w‖."""
    return (2.25 * d_in + 64) * FLOAT32_ROUNDING


def screen_rows(n_rows: int, d_sae: int) -> int:
    """How many rows are screened at once."""
    least, most = SCREEN_ROWS
    return min(max(SCREEN_VALUES // d_sae, least), most, max(1, n_rows))


def _norms_and_errors(rows: Tensor, rounded: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`max(‖row‖, ‖rounded row‖)` and `‖row − rounded row‖` of each row; zero for rows of padding."""
    norm, error = np.zeros(len(rounded), np.float32), np.zeros(len(rounded), np.float32)
    arrays = _numpy(rows), _bits(rounded), _shift(rounded.dtype)
    _in_chunks(len(rows), lambda a, b: cpu_loops.norms_and_errors(*arrays, a, b, norm, error))
    return norm, error


def dots(a: Float[Tensor, "rows d"], b: Float[Tensor, "d_sae d"], support: Support) -> Float[Tensor, " nnz"]:
    """`a[row] · b[feature]` for each entry."""
    out = np.empty(len(support.features), np.float32)
    a_rows, b_rows = _numpy(a.contiguous()), _numpy(b.contiguous())
    features, offsets = _numpy(support.features), _numpy(support.offsets)
    _in_chunks(support.n_rows, lambda i, j: cpu_loops.dots(a_rows, b_rows, features, offsets, i, j, out))
    return torch.from_numpy(out)


def combine(values: Float[Tensor, " nnz"], support: Support, b: Float[Tensor, "d_sae d"]) -> Float[Tensor, "rows d"]:
    """`Σ values · b[feature]` over each row's entries."""
    out = torch.empty((support.n_rows, b.shape[1]))
    arrays = [_numpy(t) for t in (values.contiguous(), support.features, support.offsets, b.contiguous(), out)]
    _in_chunks(support.n_rows, lambda i, j: cpu_loops.combine(*arrays, i, j))
    return out


def add_by_feature_(
    out: Float[Tensor, "d_sae d"], values: Float[Tensor, " nnz"], support: Support, a: Float[Tensor, "rows d"]
) -> None:
    """`out[feature] += Σ values · a[row]` over each feature's entries."""
    by_feature = _by_feature(support)
    entries, rows, offsets = (_numpy(t) for t in by_feature)
    arrays = _numpy(values.contiguous()), entries, rows, offsets, _numpy(a.contiguous()), _numpy(out)
    # Threads share entries, not features: a few features fire far more often than the rest.
    shares = np.linspace(0, offsets[-1], 4 * _threads() + 1)
    cuts = np.unique(np.concatenate([[0], np.searchsorted(offsets, shares[1:-1]), [support.d_sae]]))
    _in_parallel(lambda i, j: cpu_loops.add_by_feature(*arrays, i, j), list(zip(cuts[:-1], cuts[1:], strict=True)))


def sum_by_feature(values: Float[Tensor, " nnz"], support: Support) -> Float[Tensor, " d_sae"]:
    """`Σ values` over each feature's entries."""
    return torch.from_numpy(
        np.bincount(_numpy(support.features), _numpy(values), minlength=support.d_sae).astype(np.float32)
    )


def adam_(
    parameter: Float[Tensor, "n d"],
    gradient: Float[Tensor, "n d"],
    exp_avg: Float[Tensor, "n d"],
    exp_avg_sq: Float[Tensor, "n d"],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """`reference.adam_` in one pass over memory."""
    arrays = [_numpy(t) for t in (parameter, gradient, exp_avg, exp_avg_sq)]
    rate = lr / (1 - beta1**step)
    scalars = [np.float32(v) for v in (rate, beta1, 1 - beta1, beta2, 1 - beta2, eps, (1 - beta2**step) ** -0.5)]
    _in_chunks(len(parameter), lambda i, j: cpu_loops.adam(*arrays, *scalars, unit_rows, i, j))


def _by_feature(support: Support) -> ByFeature:
    """`support.by_feature`, computed by counting, which is faster than sorting, and stored there."""
    if "by_feature" not in support.__dict__:
        nnz = len(support.features)
        entries, rows = np.empty(nnz, np.int32), np.empty(nnz, np.int32)
        offsets = np.zeros(support.d_sae + 1, np.int64)
        cpu_loops.transpose(_numpy(support.features), _numpy(support.offsets), entries, rows, offsets)
        support.__dict__["by_feature"] = ByFeature(*(torch.from_numpy(a) for a in (entries, rows, offsets)))
    return support.by_feature


# --- the screening product ------------------------------------------------------------------------------------------


def screen_dtype() -> torch.dtype:
    """bfloat16 on processors that multiply it directly (AVX512_BF16, which those with AMX have too), else float32.

    Measured there: 1.9 to 2.6 times as fast as the best float32 product (EPYC Zen 4 and Zen 5). Elsewhere PyTorch
    emulates bfloat16, which can be slower than float32. Only the time depends on this, not what is selected.
    """
    direct = "avx512_bf16" in instructions() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return torch.bfloat16 if direct else torch.float32


def describe() -> str:
    """What runs, and why."""
    if screen_dtype() == torch.bfloat16:
        reason = "bfloat16 product (this processor multiplies bfloat16 directly: avx512_bf16)"
    else:
        reason = "float32 product (this processor has no avx512_bf16, so bfloat16 products may be slower)"
    return f"active features in compiled loops, screened by a {reason}"


# --- threads and memory ---------------------------------------------------------------------------------------------


def _threads() -> int:
    return torch.get_num_threads()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def _in_parallel(work: Callable[[int, int], None], spans: list[tuple[int, int]]) -> None:
    if _threads() == 1 or len(spans) == 1:
        for span in spans:
            work(*span)
    else:
        for done in [_pool(_threads()).submit(work, *span) for span in spans]:
            done.result()


def _in_chunks(n: int, work: Callable[[int, int], None]) -> None:
    """Calls `work(start, stop)` for even parts of range(n), on torch's number of threads."""
    parts = 1 if _threads() == 1 or n < 64 else 4 * _threads()
    cuts = np.linspace(0, n, parts + 1).astype(int)
    _in_parallel(work, list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _bits(tensor: Tensor) -> np.ndarray:
    """The numbers as unsigned integers, since numpy has no bfloat16; shifted left by `_shift` they are float32 bits."""
    if tensor.dtype == torch.bfloat16:
        return _numpy(tensor.view(torch.uint16))
    return _numpy(tensor).view(np.uint32)


def _shift(dtype: torch.dtype) -> np.uint32:
    return np.uint32(16 if dtype == torch.bfloat16 else 0)
