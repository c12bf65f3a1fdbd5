"""The chosen entries in the order of features: a counting sort, stable, without a comparison and without the host."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no annotations for tensors.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bits_set(word):
    word = word.to(tl.uint32)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def place(
    counts,
    starts,
    entry_count,
    group_norm,
    group_floor,
    next_level,
    silent,
    flags,
    dead_after,
    d_sae,
    groups,
    FEATURES: tl.constexpr,
):
    """Where each feature's entries will lie: anywhere, as long as they lie together.

    Also halts if a feature is dead (silent for `dead_after` rows; 0: that is no reason to halt), and clears what
    `learn_encoder` finds anew.
    """
    if tl.load(flags) != 0:
        return
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < d_sae
    n = tl.load(counts + feature, mask=inside, other=0)
    first = tl.atomic_add(entry_count, tl.sum(n, 0))
    tl.store(starts + feature, first + tl.cumsum(n, 0) - n, mask=inside)
    tl.store(group_norm + feature, 0, mask=feature < groups)
    tl.store(group_floor + feature, 0, mask=feature < groups)
    if tl.program_id(0) == 0:
        tl.store(next_level, 0)
    if dead_after > 0:
        oldest = tl.max(tl.load(silent + feature, mask=inside, other=0), 0)
        if oldest >= dead_after:
            tl.atomic_or(flags, 4)


@triton.jit
def fill(features, kept, bitmap, starts, entries, flags, width, words, ROOM: tl.constexpr, WORDS: tl.constexpr):
    """A feature's entries, rows ascending: an entry's place is the number of rows before it that have its feature."""
    if tl.load(flags) != 0:
        return
    row = tl.program_id(0)
    j = tl.arange(0, ROOM)
    there = j < tl.load(kept + row)
    entry = row * width + j
    feature = tl.load(features + entry, mask=there, other=0).to(tl.int64)
    before = tl.full([ROOM], 0, tl.int32)
    mine = row // 32
    for start in range(0, mine + 1, WORDS):
        word = start + tl.arange(0, WORDS)
        mask = there[:, None] & (word <= mine)[None, :]
        held = tl.load(bitmap + feature[:, None] * words + word[None, :], mask=mask, other=0)
        held = tl.where((word == mine)[None, :], held & ((1 << (row % 32)) - 1), held)
        before += tl.sum(_bits_set(held), 1)
    tl.store(entries + tl.load(starts + feature, mask=there, other=0) + before, entry, mask=there)


@triton.jit
def sums_of_entries(
    entries, first, n, weights, source, column, mask, width, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Over a feature's entries, rows ascending: Σ weight · source[row], and Σ weight."""
    total = tl.full([COLUMNS], 0.0, tl.float32)
    alone = tl.full([ENTRIES], 0.0, tl.float32)
    for start in range(0, n, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        entry = tl.load(entries + first + i, mask=i < n, other=0)
        weight = tl.load(weights + entry, mask=i < n, other=0.0)
        row = (entry // width).to(tl.int64)
        tile = tl.load(source + row[:, None] * d + column[None, :], mask=(i < n)[:, None] & mask[None, :], other=0.0)
        total += tl.sum(weight[:, None] * tile, 0)
        alone += weight
    return total, tl.sum(alone, 0)
