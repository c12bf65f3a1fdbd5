"""How rows that came as an array are distributed: samples → contexts → splits → shards.

A sample is a run of rows that belong together (the patches of an image, the frames of a sound): it is in one split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from store.common import HELD_OUT, SPLITS, TRAIN

BLOCK_ROWS = 64  # of an array that does not say which rows belong together: so many neighbours share a split
HELD_OUT_EVERY = 20
LONGEST_CONTEXT, CUT_CONTEXT = 2048, 512  # a sample of up to 2,048 rows is one context; a longer one is cut
SHARD_ROWS = 8192
WINDOW_BYTES, WINDOW_SHARDS = 1 << 28, 64


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of an array: number of rows of each, and whether the array (or the caller) said so."""

    lengths: Int[np.ndarray, " samples"]
    told: bool

    @property
    def starts(self) -> Int[np.ndarray, " samples"]:
        """The first row of each sample."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Context c holds the rows `start[c]` … `stop[c]` − 1 of sample `sample[c]`; shorter ones are padded to seq_len.

    `contexts[split]` are the numbers of a split's contexts, ascending.
    """

    seq_len: int
    contexts_per_shard: int
    start: Int[np.ndarray, " contexts"]
    stop: Int[np.ndarray, " contexts"]
    sample: Int[np.ndarray, " contexts"]
    contexts: dict[str, Int[np.ndarray, " some"]]

    @property
    def n_shards(self) -> dict[str, int]:
        """Shards of each split."""
        return {split: -(-len(found) // self.contexts_per_shard) for split, found in self.contexts.items()}

    def windows(self, split: str, row_bytes: int) -> Iterator[dict[int, Int[np.ndarray, " some"]]]:
        """The contexts of each shard, window by window: within a window, contexts are dealt to its shards in turn.

        So each shard holds rows from the whole window, also where the array is sorted, and the array is read once from
        beginning to end. A window has up to 64 shards, and rows of about 256 MB.
        """
        shards, each = self.n_shards[split], self.contexts_per_shard
        width = max(1, min(WINDOW_SHARDS, WINDOW_BYTES // (each * self.seq_len * row_bytes)))
        for first in range(0, shards, width):
            count = min(width, shards - first)
            part = self.contexts[split][first * each : (first + count) * each]
            yield {first + i: part[i::count] for i in range(count)}


def samples_of(
    n_rows: int, lengths: Int[np.ndarray, " samples"] | None, rows_per_sample: int | None, where: str
) -> Samples:
    """The samples of an array of `n_rows` rows, whose own samples have these lengths (None: it has no samples).

    Without any statement, 64 neighbouring rows count as one sample, because they may belong together.
    Raises: ValueError if `rows_per_sample` contradicts the array.
    """
    if rows_per_sample is not None and rows_per_sample < 1:
        raise ValueError(f"harvest: --rows-per-sample must be at least 1, got {rows_per_sample}.")
    if lengths is not None:
        if rows_per_sample is not None and (lengths != rows_per_sample).any():
            raise ValueError(
                f"{where}: its samples have {_range(lengths)} rows, but --rows-per-sample is {rows_per_sample}. Leave "
                "the flag out: the array says which rows belong together."
            )
        return Samples(lengths, told=True)
    if rows_per_sample is None:
        whole, rest = divmod(n_rows, BLOCK_ROWS)
        return Samples(np.array([BLOCK_ROWS] * whole + [rest] * bool(rest), np.int64), told=False)
    if n_rows % rows_per_sample:
        raise ValueError(
            f"{where}: its {n_rows:,} rows are not a multiple of --rows-per-sample {rows_per_sample}; "
            f"{n_rows % rows_per_sample} rows would be left over."
        )
    return Samples(np.full(n_rows // rows_per_sample, rows_per_sample, np.int64), told=True)


def _range(lengths: Int[np.ndarray, " samples"]) -> str:
    low, high = int(lengths.min()), int(lengths.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def plan_rows(samples: Samples, where: str) -> RowPlan:
    """Contexts, splits and shards. Raises: ValueError with fewer than two samples: each split needs one."""
    filled = np.flatnonzero(samples.lengths)
    if len(filled) < 2:
        what = "sample" if samples.told else f"block of {BLOCK_ROWS} rows"
        raise ValueError(
            f"{where}: has {len(filled)} {what}; training and held-out rows need at least one each. Give more rows, or "
            "say which rows belong together: --rows-per-sample 1 if every row stands alone."
        )
    longest = int(samples.lengths.max())
    seq_len = longest if longest <= LONGEST_CONTEXT else CUT_CONTEXT
    parts = -(-samples.lengths // seq_len)
    sample = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(len(sample)) - np.repeat(np.cumsum(parts) - parts, parts)
    start = samples.starts[sample] + part * seq_len
    stop = np.minimum(start + seq_len, (samples.starts + samples.lengths)[sample])
    held_out = np.zeros(len(parts), bool)
    held_out[filled[_held_out(len(filled))]] = True
    chosen = held_out[sample]
    contexts = {HELD_OUT: np.flatnonzero(chosen), TRAIN: np.flatnonzero(~chosen)}
    per_shard = max(1, min(SHARD_ROWS // seq_len, *(len(contexts[split]) for split in SPLITS)))
    return RowPlan(seq_len, per_shard, start, stop, sample, contexts)


def _held_out(n: int) -> Int[np.ndarray, " some"]:
    """The numbers of the samples that are held out: the twentieth with the smallest hashes, at least one."""
    hashes = _mixed(np.arange(n, dtype=np.uint64))
    return np.argsort(hashes, kind="stable")[: max(1, n // HELD_OUT_EVERY)]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64 of each number (Steele, Lea and Flood 2014): neighbours get unrelated hashes."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
