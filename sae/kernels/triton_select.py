"""The encoder on a GPU: screens in float16, computes the few candidates in float32, and selects among them."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.batch_topk import batch_topk
from sae.kernels.sparsity import Above, BatchTopK, NotSparse, PreparedEncoder, Rule, Support, TopK
from sae.kernels.triton_products import dots
from sae.kernels.triton_screen import Narrow, _count, _list, _mark, _screen, narrowed

# Dense is faster if some row has more candidates than this share of the features, and more than this number.
DENSE_SHARE = 1 / 4
DENSE_FEATURES = 1024
KEPT_NUMBERS = 2**27  # screened values in memory at once: 256 MiB
BLOCK_WORDS = 128  # words of 32 features each that one program works on
GROUP = 32  # features in a group: its largest sure value represents it in the search for a row's k-th largest value

# See screening_bound.md for these three.
FLOAT16_ROUNDING, FLOAT16_SMALLEST = 2.0**-11, 2.0**-24
FLOAT32_SPACING = 2.0**-23


def prepare(W_enc: Float[Tensor, "d_in d_sae"]) -> NarrowEncoder:
    """The encoder's rows in float16, with their norms and rounding errors."""
    return NarrowEncoder(W_enc, narrowed(W_enc.detach().t()))


@dataclass(frozen=True, eq=False)
class NarrowEncoder(PreparedEncoder):
    """An encoder and its rows, one per feature, in float16."""

    narrow: Narrow


def select(
    x: Float[Tensor, "rows d_in"], encoder: PreparedEncoder, bias: Float[Tensor, " d_sae"], rule: Rule
) -> tuple[Support, Float[Tensor, " nnz"]]:
    """The active features of each row under `rule`, and their pre-activations `x · W_enc + bias` in float32.

    Raises: NotSparse if some row has too many candidates (see DENSE_SHARE), or a number is not finite.
    """
    assert isinstance(encoder, NarrowEncoder)
    batch = Batch(x, encoder, bias)
    match rule:
        case TopK(k):
            return batch.top(min(k, len(bias)))
        case Above(threshold):
            return batch.above(threshold)
        case BatchTopK():
            return batch_topk(x, encoder, bias, rule, batch.above)


class Bounds(NamedTuple):
    """The arguments of `_slack` besides norms and errors."""

    base: Float[Tensor, " d_sae"]  # bias − threshold
    doubt: Float[Tensor, " d_sae"]  # its rounding
    rounding: float  # of the sums, as a share of ‖x‖ ‖w‖


class Batch:
    """A batch in float16, ready to be selected from."""

    def __init__(self, x: Tensor, encoder: NarrowEncoder, bias: Tensor) -> None:
        self.x, self.weights, self.bias = x.detach(), encoder.W_enc.detach().t(), bias.detach()
        self.narrow_x, self.narrow_w = narrowed(self.x), encoder.narrow

    def above(self, threshold: Tensor) -> tuple[Support, Tensor]:
        """Everything above one threshold per feature. The bar is known beforehand, so only bits are stored."""
        bar = torch.zeros(len(self.x), device=self.x.device)
        bits = _words(len(self.x), len(self.bias), self.x.device)
        bounds = self._bounds(threshold)
        _multiply(self.narrow_x, self.narrow_w, bounds, bar=bar, bits=bits)
        candidates, _ = self._listed(bits, bounds)
        pre = self._exact(candidates)
        kept = pre > threshold[candidates.features.long()]
        return candidates.where(kept), pre[kept]

    def top(self, k: int) -> tuple[Support, Tensor]:
        """The k largest positive entries of each row.

        A feature below the k-th largest of the groups' sure values cannot be among them. That bar is known only after
        the product, which is therefore stored in float16, some rows at a time.
        """
        bits, bounds = _words(len(self.x), len(self.bias), self.x.device), self._bounds(torch.zeros_like(self.bias))
        for rows in _spans(len(self.x), max(128, KEPT_NUMBERS // len(self.bias))):
            _mark_top(Narrow(*(t[rows] for t in self.narrow_x)), self.narrow_w, bounds, k, bits[rows])
        candidates, widest = self._listed(bits, bounds)
        pre = self._exact(candidates)
        kept = torch.empty(len(pre), dtype=torch.int8, device=pre.device)
        if len(pre):
            n, room = candidates.n_rows, triton.next_power_of_2(widest)
            rows = max(1, 512 // room)
            _keep_largest[(triton.cdiv(n, rows),)](
                pre, candidates.offsets, kept, n, k, ROWS=rows, ROOM=room, num_warps=min(16, max(1, room // 512))
            )
        found = kept.view(torch.bool)
        return candidates.where(found), pre[found]

    def _bounds(self, threshold: Tensor) -> Bounds:
        sums = self.x.shape[1] / 8 + 64
        doubt = 2 * FLOAT32_SPACING * (self.bias.abs() + threshold.abs())
        return Bounds((self.bias - threshold).contiguous(), doubt.contiguous(), sums * FLOAT32_SPACING)

    def _exact(self, candidates: Support) -> Tensor:
        return dots(self.x, self.weights, candidates) + self.bias[candidates.features.long()]

    def _listed(self, bits: Int[Tensor, "rows words"], bounds: Bounds) -> tuple[Support, int]:
        """The set bits as a support, and the largest number in one row. The only place that waits for the device."""
        (rows, words), d_sae = bits.shape, len(self.bias)
        blocks = _word_blocks(words)
        chunks = triton.cdiv(words, blocks["WORDS"])
        grid = (triton.cdiv(rows, blocks["ROWS"]), chunks)
        counts = torch.zeros((rows, chunks), dtype=torch.int32, device=bits.device)
        if rows:
            _count[grid](bits, counts, rows, words, chunks, **blocks)
        ends = counts.flatten().cumsum(0, dtype=torch.int64)
        offsets = torch.nn.functional.pad(ends[chunks - 1 :: chunks], (1, 0))
        finite = self.narrow_x.norm.isfinite().all() & self.narrow_w.norm.isfinite().all() & ~bounds.base.isnan().any()
        widest = offsets.diff().amax() if rows else offsets[0]
        nnz, most, sound = torch.stack([offsets[-1], widest, finite.long()]).tolist()
        if not sound:
            raise NotSparse("rows or weights are not finite")
        if most > max(DENSE_FEATURES, DENSE_SHARE * d_sae):
            raise NotSparse(f"up to {most:,} of {d_sae:,} features may be active in a row")
        features = torch.empty(nnz, dtype=torch.int32, device=bits.device)
        if nnz:
            _list[grid](bits, ends - counts.flatten(), features, rows, words, chunks, **blocks)
        return Support(features, offsets, d_sae), most


@triton.jit
def _keep_largest(values, offsets, kept, n, k, ROWS: tl.constexpr, ROOM: tl.constexpr):
    """Marks the k largest positive values of each row; among equal values the first are taken.

    Finds the k-th largest bit by bit: positive float32 numbers are ordered as their bits are, read as integers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.load(offsets + row, mask=row < n, other=0)
    last = tl.load(offsets + row + 1, mask=row < n, other=0)
    place = first[:, None] + tl.arange(0, ROOM)[None, :]
    inside = place < last[:, None]
    value = tl.load(values + place, mask=inside, other=0.0)
    key = tl.where(value > 0.0, value.to(tl.int32, bitcast=True), 0)
    bar = tl.full([ROWS], 0, tl.int32)
    for step in range(31):
        higher = bar | (1 << (30 - step))
        bar = tl.where(tl.sum((key >= higher[:, None]).to(tl.int32), 1) >= k, higher, bar)
    above = key > bar[:, None]
    ties = ((key == bar[:, None]) & (key > 0)).to(tl.int32)
    allowed = k - tl.sum(above.to(tl.int32), 1)
    keep = above | ((ties == 1) & (tl.cumsum(ties, 1) <= allowed[:, None]))
    tl.store(kept + place, keep.to(tl.int8), mask=inside)


def _mark_top(x: Narrow, w: Narrow, bounds: Bounds, k: int, bits: Tensor) -> None:
    """Sets the bits of features that may be among the k largest positive of each row."""
    rows, d_sae, d_in = len(x.numbers), len(w.numbers), x.numbers.shape[1]
    group = GROUP
    while group > 1 and d_sae < 2 * k * group:
        group //= 2
    groups = triton.cdiv(d_sae, group)
    lows = torch.empty((rows, groups), device=bits.device)
    screened = torch.empty((rows, d_sae), dtype=torch.float16, device=bits.device)
    grow = float(triton.next_power_of_2(max(1, d_in // 8192)))  # |x̂ · ŵ| < 4 d_in in the rows' units must fit float16
    _multiply(x, w, bounds, screened=screened, lows=lows, group=group, shrink=1 / grow)
    bar = lows.topk(k).values[:, -1].clamp_min(0.0) if k <= groups else lows.new_zeros(rows)
    words = bits.shape[1]
    blocks = _word_blocks(words)
    _mark[(triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(words, blocks["WORDS"]))](
        screened,
        *x[1:],
        *w[1:],
        *bounds,
        bar,
        bits,
        rows,
        d_sae,
        words,
        grow,
        FLOAT16_ROUNDING,
        FLOAT16_SMALLEST,
        **blocks,
    )


def _multiply(
    x: Narrow,
    w: Narrow,
    bounds: Bounds,
    *,
    bar: Tensor | None = None,
    bits: Tensor | None = None,
    screened: Tensor | None = None,
    lows: Tensor | None = None,
    group: int = 1,
    shrink: float = 1.0,
) -> None:
    """Runs `_screen`: with `bar` it sets `bits`; without one it stores the product in `screened`, `lows` of groups."""
    n, d_in = x.numbers.shape
    d_sae, keep = len(w.numbers), screened is not None
    words = bits.shape[1] if bits is not None else 0
    groups = lows.shape[1] if lows is not None else 0
    if n:
        kernel, blocks = _tuned_screen()
        kernel[lambda block: (triton.cdiv(n, block["ROWS"]) * triton.cdiv(d_sae, block["FEATURES"]),)](
            x.numbers,
            *x[1:],
            w.numbers,
            *w[1:],
            *bounds,
            bar,
            bits,
            screened,
            lows,
            n,
            d_sae,
            d_in,
            words,
            groups,
            shrink,
            KEEP=keep,
            GROUP=group,
            **blocks,
        )


@cache
def _tuned_screen() -> tuple[Any, dict[str, int]]:
    """The kernel and its block sizes: autotuned on a device, small ones in the interpreter."""
    if interpreted():
        return _screen, {"ROWS": 64, "FEATURES": 128, "INPUTS": 64}
    configs = [
        triton.Config({"ROWS": rows, "FEATURES": features, "INPUTS": inputs}, num_warps=warps, num_stages=stages)
        for rows, features, inputs, warps, stages in (
            (128, 256, 64, 8, 3),
            (128, 128, 64, 8, 3),
            (128, 128, 64, 8, 4),
            (128, 128, 32, 8, 4),
            (64, 128, 64, 4, 4),
        )
    ]
    return triton.autotune(configs, key=["d_sae", "d_in", "KEEP"])(_screen), {}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU, which is slow and meant for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _words(rows: int, d_sae: int, device: torch.device) -> Int[Tensor, "rows words"]:
    return torch.empty((rows, triton.cdiv(d_sae, 32)), dtype=torch.int32, device=device)


def _word_blocks(words: int) -> dict[str, int]:
    """Rows and words of the blocks in which bits are set and read; about 4,096 bits each."""
    width = min(BLOCK_WORDS, triton.next_power_of_2(words))
    return {"ROWS": BLOCK_WORDS // width, "WORDS": width}


def _spans(n: int, size: int) -> list[slice]:
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]
