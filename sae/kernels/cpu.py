"""The CPU backend: one low-precision product finds the few candidates of each row, numba loops do the rest in float32.

The product only *screens*: a bound on its rounding errors says which features can be active, and only those get their
exact float32 dot product. So the result is the float32 result at the speed of the low-precision product. The bound is
derived in `screening_bound.md`. The loops run on as many threads as torch uses.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels import cpu_loops, cpu_screen
from sae.kernels.batch_topk import batch_topk
from sae.kernels.cpu_screen import Screen, ScreeningEncoder
from sae.kernels.sparsity import Above, BatchTopK, ByFeature, NotSparse, PreparedEncoder, Rule, Support, TopK
from sae.kernels.threads import in_chunks, in_parallel, threads

NAME = "cpu"

prepare = cpu_screen.prepare

# A row has space for this share of the features, and for at least this number. If it needs more, dense is faster.
MAX_ACTIVE_SHARE = 1 / 4
MIN_ROW_SPACE = 64


def describe() -> str:
    """What runs, and why."""
    return f"active features in compiled loops, screened by {cpu_screen.describe()}"


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
    tried = np.zeros(n_rows, np.int32)
    exact = [_numpy(t.detach().float().contiguous()) for t in (x, encoder.rows, bias, threshold)]
    for first in range(0, n_rows, len(screen.buffer)):
        block = screen.product(first, min(n_rows, first + len(screen.buffer)))

        def choose(start: int, stop: int, block: np.ndarray = block, first: int = first) -> None:
            cpu_loops.choose(block, *screen.arrays, *exact, k, first, start, stop, features, values, counts, tried)

        in_chunks(len(block), choose)
    if (counts > space).any():
        raise NotSparse(f"more than {space:,} of {d_sae:,} features are active in a row")
    offsets = np.zeros(n_rows + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    flat_features, flat_values = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    in_chunks(n_rows, lambda a, b: cpu_loops.compact(features, values, offsets, a, b, flat_features, flat_values))
    return Support(torch.from_numpy(flat_features), torch.from_numpy(offsets), d_sae), torch.from_numpy(flat_values)


def dots(a: Float[Tensor, "rows d"], b: Float[Tensor, "d_sae d"], support: Support) -> Float[Tensor, " nnz"]:
    """`a[row] · b[feature]` for each entry."""
    out = np.empty(len(support.features), np.float32)
    a_rows, b_rows = _numpy(a.contiguous()), _numpy(b.contiguous())
    features, offsets = _numpy(support.features), _numpy(support.offsets)
    in_chunks(support.n_rows, lambda i, j: cpu_loops.dots(a_rows, b_rows, features, offsets, i, j, out))
    return torch.from_numpy(out)


def combine(values: Float[Tensor, " nnz"], support: Support, b: Float[Tensor, "d_sae d"]) -> Float[Tensor, "rows d"]:
    """`Σ values · b[feature]` over each row's entries."""
    out = torch.empty((support.n_rows, b.shape[1]))
    arrays = [_numpy(t) for t in (values.contiguous(), support.features, support.offsets, b.contiguous(), out)]
    in_chunks(support.n_rows, lambda i, j: cpu_loops.combine(*arrays, i, j))
    return out


def add_by_feature_(
    out: Float[Tensor, "d_sae d"], values: Float[Tensor, " nnz"], support: Support, a: Float[Tensor, "rows d"]
) -> None:
    """`out[feature] += Σ values · a[row]` over each feature's entries."""
    by_feature = _by_feature(support)
    entries, rows, offsets = (_numpy(t) for t in by_feature)
    arrays = _numpy(values.contiguous()), entries, rows, offsets, _numpy(a.contiguous()), _numpy(out)
    # Threads share entries, not features: a few features fire far more often than the rest.
    shares = np.linspace(0, offsets[-1], 4 * threads() + 1)
    cuts = np.unique(np.concatenate([[0], np.searchsorted(offsets, shares[1:-1]), [support.d_sae]]))
    in_parallel(lambda i, j: cpu_loops.add_by_feature(*arrays, i, j), list(zip(cuts[:-1], cuts[1:], strict=True)))


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
    in_chunks(len(parameter), lambda i, j: cpu_loops.adam(*arrays, *scalars, unit_rows, i, j))


def _by_feature(support: Support) -> ByFeature:
    """`support.by_feature`, computed by counting, which is faster than sorting, and stored there."""
    if "by_feature" not in support.__dict__:
        nnz = len(support.features)
        entries, rows = np.empty(nnz, np.int32), np.empty(nnz, np.int32)
        offsets = np.zeros(support.d_sae + 1, np.int64)
        cpu_loops.transpose(_numpy(support.features), _numpy(support.offsets), entries, rows, offsets)
        support.__dict__["by_feature"] = ByFeature(*(torch.from_numpy(a) for a in (entries, rows, offsets)))
    return support.by_feature


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()
