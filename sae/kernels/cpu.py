"""The CPU path: one dense product in bfloat16 to find the candidates, everything after it on active features only.

The bfloat16 product only *screens*. Rounding errors have bounds, ‖x − x̂‖ ‖w‖ + ‖x̂‖ ‖w − ŵ‖ by Cauchy–Schwarz, so a
feature whose screened value plus its bound stays below the row's threshold cannot be active; the few others get their
exact float32 dot product, and the selection is made from those. The result is the float32 result at the speed of the
narrow product. Loops are compiled by numba and run on as many threads as torch uses.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels import cpu_loops, matmul
from sae.kernels.batch_topk import batch_topk
from sae.kernels.cpu_loops import GROUP
from sae.kernels.processor import instructions
from sae.kernels.sparsity import Above, BatchTopK, ByFeature, NotSparse, Rule, Support, TopK

NAME = "cpu"
SCREEN_NUMBERS, SCREEN_ROWS = 1 << 24, (1024, 4096)  # screened values held at once, in so many rows at least, at most
ROOM_SHARE = 1 / 4  # room for this share of the features in a row; a batch that needs more is a case for dense products
ROOM_FEATURES = 64
BFLOAT16_ROUNDING = 2.0**-8
FLOAT32_SUM_ROUNDING = 2.0**-17  # of ‖x‖ ‖w‖, for sums of up to some thousand terms


def select(
    x: Float[Tensor, "rows d_in"], W_enc: Float[Tensor, "d_in d_sae"], bias: Float[Tensor, " d_sae"], rule: Rule
) -> tuple[Support, Float[Tensor, " nnz"]]:
    """The active features of each row under `rule`, with their pre-activations `x · W_enc + bias` in float32.

    Raises: NotSparse when more than a quarter of all features pass a threshold in some row, or a number is none.
    """
    match rule:
        case TopK(k):
            return _screened(x, W_enc, bias, min(k, len(bias)), torch.zeros_like(bias))
        case Above(threshold):
            return _screened(x, W_enc, bias, 0, threshold)
        case BatchTopK():
            return batch_topk(x, W_enc, bias, rule, lambda threshold: _screened(x, W_enc, bias, 0, threshold))


def _screened(x: Tensor, W_enc: Tensor, bias: Tensor, k: int, threshold: Tensor) -> tuple[Support, Tensor]:
    """The k largest above the thresholds of each row, or all of them (k = 0)."""
    x = x.detach().float().contiguous()
    rows, d_sae = len(x), W_enc.shape[1]
    encoder = _encoder(W_enc)
    screen = Screen.of(x, encoder, bias, threshold)
    if not screen.finite:
        raise NotSparse("rows or weights are not finite")
    width = min(d_sae, k or max(ROOM_FEATURES, int(ROOM_SHARE * d_sae)))
    features, values = np.empty((rows, width), np.int32), np.empty((rows, width), np.float32)
    counts = np.zeros(rows, np.int64)
    exact = [_numpy(t.detach().float().contiguous()) for t in (x, encoder.rows, bias, threshold)]
    for start in range(0, rows, len(screen.buffer)):
        block = screen.rows(start, min(rows, start + len(screen.buffer)))

        def choose(a: int, b: int, block: np.ndarray = block, start: int = start) -> None:
            cpu_loops.choose(block, *screen.arrays, *exact, k, start, a, b, features, values, counts)

        _in_chunks(len(block), choose)
    if (counts > width).any():
        raise NotSparse(f"more than {width:,} of {d_sae:,} features are active in a row")
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    flat_features, flat_values = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    _in_chunks(rows, lambda a, b: cpu_loops.compact(features, values, offsets, a, b, flat_features, flat_values))
    return Support(torch.from_numpy(flat_features), torch.from_numpy(offsets), d_sae), torch.from_numpy(flat_values)


class Encoder(NamedTuple):
    """An encoder narrowed, feature by feature, and per feature `norm ≥ ‖w‖, ‖ŵ‖` and `error = ‖w − ŵ‖`."""

    rows: Tensor  # [d_sae, d_in] float32
    narrow: Tensor  # padded with zero rows to whole groups
    norm: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, rows: Tensor) -> Encoder:
        narrow, (d_sae, d_in) = screen_dtype(), rows.shape
        padded = -(-d_sae // GROUP) * GROUP
        W_narrow = torch.zeros((padded, d_in), dtype=narrow)
        W_narrow[:d_sae] = rows
        return cls(rows, W_narrow, *_lengths(rows, W_narrow))


def _lengths(rows: Tensor, narrow: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`norm ≥ ‖row‖, ‖narrow row‖` and `error = ‖row − narrow row‖`, for each narrow row; padding has none."""
    norm, error = np.zeros(len(narrow), np.float32), np.zeros(len(narrow), np.float32)
    arrays = _numpy(rows), _bits(narrow), _shift(narrow.dtype)
    _in_chunks(len(rows), lambda a, b: cpu_loops.lengths(*arrays, a, b, norm, error))
    return norm, error


_kept: list[tuple[Tensor, Encoder]] = []  # at most one


def _encoder(W_enc: Tensor) -> Encoder:
    """The narrowed encoder; that of weights which nobody trains is kept while their products with a vector stay."""
    rows = _feature_rows(W_enc)
    if W_enc.requires_grad:
        return Encoder.of(rows)
    mark = rows @ torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
    held = _kept[0] if _kept else None  # once, as other threads may put in theirs
    if held is None or not torch.equal(held[0], mark):
        held = mark, Encoder.of(rows)
        _kept[:] = [held]
    return held[1]._replace(rows=rows)


def screen_rows(rows: int, d_sae: int) -> int:
    """Rows whose screened values are held at once: many, as each product wakes the threads that the loops need too."""
    return min(max(SCREEN_NUMBERS // d_sae, SCREEN_ROWS[0]), SCREEN_ROWS[1], max(1, rows))


@dataclass
class Screen:
    """The narrow product of a batch, and how far each of its values may lie from the exact one.

    `|x·w + bias − threshold − (screened + base)| ≤ x_norm · margin[feature] + rounding · |screened|`, with
    base = bias − threshold.
    """

    x: Tensor  # narrow
    weights: Tensor  # narrow, padded with zero rows to whole groups
    buffer: Tensor
    arrays: tuple[Any, ...]  # x_norm, margin, base, rounding, bit shift: what the loop needs

    @classmethod
    def of(cls, x: Tensor, encoder: Encoder, bias: Tensor, threshold: Tensor) -> Screen:
        narrow, padded = encoder.narrow.dtype, len(encoder.narrow)
        x_narrow = x.to(narrow)
        x_norm, x_error = _lengths(x, x_narrow)
        relative = (x_error / np.maximum(x_norm, np.float32(1e-30))).max(initial=0)
        base = np.full(padded, cpu_loops.LEAST, np.float32)
        base[: len(bias)] = _numpy(bias - threshold)
        margin = np.float32(relative + FLOAT32_SUM_ROUNDING) * encoder.norm + encoder.error
        rounding = np.float32(BFLOAT16_ROUNDING if narrow == torch.bfloat16 else 0.0)
        buffer = torch.empty((screen_rows(len(x), padded), padded), dtype=narrow)
        return cls(x_narrow, encoder.narrow, buffer, (x_norm, margin, base, rounding, _shift(narrow)))

    @property
    def finite(self) -> bool:
        x_norm, margin, base = self.arrays[:3]
        return bool(np.isfinite(x_norm).all() and np.isfinite(margin).all() and not np.isnan(base).any())

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The bits of the screened values of rows start … stop."""
        with matmul.using(matmul.choose("auto")):
            return _bits(torch.mm(self.x[start:stop], self.weights.t(), out=self.buffer[: stop - start]))


def dots(a: Float[Tensor, "rows d"], b: Float[Tensor, "d_sae d"], support: Support) -> Float[Tensor, " nnz"]:
    """`a[row] · b[feature]` for every entry."""
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
    """One step of Adam in one pass. With `unit_rows` the gradient's part along each row is taken out before, and the
    row is brought back to unit norm after."""
    arrays = [_numpy(t) for t in (parameter, gradient, exp_avg, exp_avg_sq)]
    rate = lr / (1 - beta1**step)
    scalars = [np.float32(v) for v in (rate, beta1, 1 - beta1, beta2, 1 - beta2, eps, (1 - beta2**step) ** -0.5)]
    _in_chunks(len(parameter), lambda i, j: cpu_loops.adam(*arrays, *scalars, unit_rows, i, j))


def _by_feature(support: Support) -> ByFeature:
    """`support.by_feature`, by counting instead of sorting, and kept there."""
    if "by_feature" not in support.__dict__:
        nnz = len(support.features)
        entries, rows = np.empty(nnz, np.int32), np.empty(nnz, np.int32)
        offsets = np.zeros(support.d_sae + 1, np.int64)
        cpu_loops.transpose(_numpy(support.features), _numpy(support.offsets), entries, rows, offsets)
        support.__dict__["by_feature"] = ByFeature(*(torch.from_numpy(a) for a in (entries, rows, offsets)))
    return support.by_feature


# --- which product screens ------------------------------------------------------------------------------------------


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
    """`work(start, stop)` over even parts of range(n), on torch's number of threads."""
    parts = 1 if _threads() == 1 or n < 64 else 4 * _threads()
    cuts = np.linspace(0, n, parts + 1).astype(int)
    _in_parallel(work, list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _bits(tensor: Tensor) -> np.ndarray:
    """The integers that hold the numbers (numpy has no bfloat16); shifted left by `_shift` they are float32's."""
    if tensor.dtype == torch.bfloat16:
        return _numpy(tensor.view(torch.uint16))
    return _numpy(tensor).view(np.uint32)


def _shift(dtype: torch.dtype) -> np.uint32:
    return np.uint32(16 if dtype == torch.bfloat16 else 0)


def _feature_rows(W_enc: Tensor) -> Tensor:
    """The encoder feature by feature: no copy for a dictionary of ours, which keeps it so in memory."""
    return W_enc.detach().t().float().contiguous()
