"""Sums over active features on a GPU, without an [nnz, d] matrix in memory.

Every run gives the same bits: sums have one fixed order, there are no atomics, and block sizes follow from the shapes
alone (nothing is autotuned).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae.kernels.sparsity import Support

DOT_ENTRIES, DOT_COLUMNS = 16, 128  # block of `_dots`
SUM_NUMBERS = 4096  # numbers in a block of `_sum_rows`
SUM_COLUMNS = 512  # and its columns at most


@triton.jit
def _dots(
    a, a_row, a_column, b, b_row, b_column, rows, features, out, nnz, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[e] = a[rows[e]] · b[features[e]] for ENTRIES entries. Reads nnz · d numbers of b; a comes from the cache."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < nnz
    row = tl.load(rows + entry, mask=inside, other=0).to(tl.int64)
    feature = tl.load(features + entry, mask=inside, other=0).to(tl.int64)
    total = tl.full([ENTRIES, COLUMNS], 0.0, tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        mask = inside[:, None] & (column < d)[None, :]
        left = tl.load(a + row[:, None] * a_row + column[None, :] * a_column, mask=mask, other=0.0)
        right = tl.load(b + feature[:, None] * b_row + column[None, :] * b_column, mask=mask, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(out + entry, tl.sum(total, 1), mask=inside)


@triton.jit
def _sum_rows(
    values,
    entries,
    indices,
    offsets,
    source,
    source_row,
    source_column,
    out,
    out_row,
    out_column,
    d,
    ADD: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[g] (+)= Σ values[entries[n]] · source[indices[n]] over n = offsets[g] … offsets[g + 1] − 1.

    Reads nnz · d numbers of source and writes each row of out once; with ADD only the rows that have entries.
    """
    group = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + group), tl.load(offsets + group + 1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    real = column < d
    if ADD and first == last:
        return
    total = tl.full([COLUMNS], 0.0, tl.float32)
    for start in range(first, last, ENTRIES):
        n = start + tl.arange(0, ENTRIES)
        inside = n < last
        entry = tl.load(entries + n, mask=inside, other=0).to(tl.int64) if ADD else n
        value = tl.load(values + entry, mask=inside, other=0.0).to(tl.float32)
        index = tl.load(indices + n, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & real[None, :]
        rows = tl.load(source + index[:, None] * source_row + column[None, :] * source_column, mask=mask, other=0.0)
        total += tl.sum(value[:, None] * rows.to(tl.float32), 0)
    place = out + group * out_row + column * out_column
    if ADD:
        total += tl.load(place, mask=real)
    tl.store(place, total, mask=real)


def dots(a: Float[Tensor, "rows d"], b: Float[Tensor, "d_sae d"], support: Support) -> Float[Tensor, " nnz"]:
    """`a[row] · b[feature]` for each entry, in float32."""
    nnz, d = len(support.features), a.shape[1]
    out = torch.empty(nnz, device=a.device, dtype=torch.float32)
    if nnz:
        _dots[(triton.cdiv(nnz, DOT_ENTRIES),)](
            a,
            *a.stride(),
            b,
            *b.stride(),
            support.rows,
            support.features,
            out,
            nnz,
            d,
            ENTRIES=DOT_ENTRIES,
            COLUMNS=min(DOT_COLUMNS, triton.next_power_of_2(d)),
        )
    return out


def combine(values: Float[Tensor, " nnz"], support: Support, b: Float[Tensor, "d_sae d"]) -> Float[Tensor, "rows d"]:
    """`Σ values · b[feature]` over each row's entries, in float32."""
    out = torch.empty((support.n_rows, b.shape[1]), device=b.device, dtype=torch.float32)
    _sum_over(values, support.features, support.features, support.offsets, b, out, add=False)
    return out


def add_by_feature_(
    out: Float[Tensor, "d_sae d"], values: Float[Tensor, " nnz"], support: Support, a: Float[Tensor, "rows d"]
) -> None:
    """`out[feature] += Σ values · a[row]` over each feature's entries; other rows of out are not touched."""
    entries, rows, offsets = support.by_feature
    _sum_over(values, entries, rows, offsets, a, out, add=True)


def sum_by_feature(values: Float[Tensor, " nnz"], support: Support) -> Float[Tensor, " d_sae"]:
    """`Σ values` over each feature's entries: `add_by_feature_` where every row of a is the number one."""
    out = torch.zeros(support.d_sae, device=values.device, dtype=torch.float32)
    add_by_feature_(out[:, None], values, support, out.new_ones(1).expand(support.n_rows, 1))
    return out


def _sum_over(
    values: Tensor, entries: Tensor, indices: Tensor, offsets: Tensor, source: Tensor, out: Tensor, *, add: bool
) -> None:
    groups, d = out.shape
    if not groups or (add and not len(indices)):
        return
    columns = min(SUM_COLUMNS, triton.next_power_of_2(d))
    _sum_rows[(groups, triton.cdiv(d, columns))](
        values.contiguous(),
        entries,
        indices,
        offsets,
        source,
        *source.stride(),
        out,
        *out.stride(),
        d,
        ADD=add,
        ENTRIES=min(128, SUM_NUMBERS // columns),
        COLUMNS=columns,
    )
