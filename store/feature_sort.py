"""For the feature index: a counting sort on disk, and the statistics of each feature's firings."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from store.common import reserve


@dataclass(frozen=True)
class SortedFirings:
    """Every activation of an index, by feature and by row, with its text; memory-mapped, read-only.

    Feature f fires on `rows[ptr[f] : ptr[f + 1]]` (ascending) with `values`; on row r the features
    `row_features[row_ptr[r] : row_ptr[r + 1]]` fire with `row_values`.
    `tokens`, `keep`, `domain` (number of the row's domain, -1 on padding) are [n_contexts, seq_len].
    """

    ptr: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    row_ptr: np.ndarray
    row_features: np.ndarray
    row_values: np.ndarray
    tokens: np.ndarray
    keep: np.ndarray
    domain: np.ndarray


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Indices that sort `keys`, stable. 16-bit keys are sorted as such, since numpy then uses a radix sort."""
    return np.argsort(keys.astype(np.uint16) if keys.max(initial=0) < 1 << 16 else keys, kind="stable")


def _firsts(*columns: np.ndarray) -> np.ndarray:
    """Where in sorted columns each run of equal entries begins."""
    change = np.zeros(max(0, len(columns[0]) - 1), bool)
    for column in columns:
        change |= column[1:] != column[:-1]
    return np.concatenate([[0], np.flatnonzero(change) + 1])[: len(columns[0])]


def _counted(keys: np.ndarray) -> tuple[slice, np.ndarray]:
    """The range of keys in one chunk (of a possibly much larger range), and how often each of them occurs."""
    low = int(keys.min()) if len(keys) else 0
    counts = np.bincount(keys - low)
    return slice(low, low + len(counts)), counts


class Spill:
    """Takes chunks of COO columns one after another into raw files, then scatters them into sorted columns."""

    def __init__(self, folder: Path, columns: dict[str, str]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.columns = folder, columns
        self.files = {name: (folder / f"{name}.coo").open("wb") for name in columns}
        self.order: list[tuple[int, int, int]] = []  # (sort key of the chunk, offset, length)
        self.length = 0

    def append(self, chunk_key: int, **arrays: np.ndarray) -> None:
        """Adds a chunk; chunks are sorted by their key, whatever the order they come in."""
        n = len(next(iter(arrays.values())))
        for name, dtype in self.columns.items():
            self.files[name].write(np.ascontiguousarray(arrays[name], dtype=dtype).tobytes())
        self.order.append((chunk_key, self.length, n))
        self.length += n

    def close(self) -> None:
        """Closes the raw files: nothing is appended any more."""
        with ExitStack() as closing:  # on a full disk, closing one fails; the others are closed all the same
            for file in self.files.values():
                closing.callback(file.close)

    def scatter(self, by: str, n_groups: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Counting sort by the column `by`, stable in the order of chunks. Returns (ptr, the other columns)."""
        self.close()
        ptr = np.zeros(n_groups + 1, np.int64)
        source = {name: self._map(f"{name}.coo", dtype) for name, dtype in self.columns.items()}
        for _, offset, n in self.order:
            groups, counts = _counted(source[by][offset : offset + n])
            ptr[1:][groups] += counts
        np.cumsum(ptr, out=ptr)
        others = {name: dtype for name, dtype in self.columns.items() if name != by}
        out = {name: self._map(f"{name}.by_{by}", dtype, "w+") for name, dtype in others.items()}
        free = ptr[:-1].copy()
        for _, offset, n in sorted(self.order):
            keys = source[by][offset : offset + n]
            groups, counts = _counted(keys)
            order = stable_order(keys - groups.start)
            where = np.repeat(free[groups] - (np.cumsum(counts) - counts), counts) + np.arange(n)
            for name in others:
                out[name][where] = source[name][offset : offset + n][order]
            free[groups] += counts
        return ptr, out

    def _map(self, name: str, dtype: str, mode: Any = "r") -> np.ndarray:
        if self.length == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        column = np.memmap(self.folder / name, dtype=dtype, mode=mode, shape=(self.length,))
        if mode == "w+":
            reserve(self.folder / name)
        return column


def empty_stats(d_sae: int) -> dict[str, np.ndarray]:
    """Statistics [d_sae] of features that never fire."""
    names = ("max", "mean", "mean_sq", "p99", "domain_purity", "top_token_share")
    stats = {name: np.zeros(d_sae, np.float32) for name in names}
    return stats | {name: np.full(d_sae, -1, np.int32) for name in ("domain_top", "top_token")}


def moments(stats: dict[str, np.ndarray], feature: np.ndarray, value: np.ndarray) -> None:
    """Fills in max, mean, mean square and 99th percentile over the firings of each feature.

    `feature` ascends; `value` is positive and exact in float16.
    """
    # One number sorts by both: positive float16 values are ordered as their bits are.
    key = (feature.astype(np.uint64) << np.uint64(16)) | value.astype(np.float16).view(np.uint16)
    key.sort()
    value = key.astype(np.uint16).view(np.float16).astype(np.float64)
    first = _firsts(feature)
    ids, count = feature[first], np.diff(first, append=len(feature))
    stats["max"][ids] = value[first + count - 1]
    stats["mean"][ids] = np.add.reduceat(value, first) / count
    stats["mean_sq"][ids] = np.add.reduceat(value**2, first) / count
    # the smallest value with 99% of the firings at or below it, as in feature_stats.safetensors
    stats["p99"][ids] = value[first + np.ceil(0.99 * count).astype(np.int64) - 1]


@dataclass(frozen=True)
class Pairs:
    """Sums over the firings of each (feature, token) pair that occurs, ascending."""

    feature: np.ndarray
    token: np.ndarray
    count: np.ndarray
    sum: np.ndarray
    max: np.ndarray


def token_pairs(feature: np.ndarray, token: np.ndarray, value: np.ndarray) -> Pairs:
    """Count, Σ and max of `value` for each pair that occurs."""
    order = stable_order(token)
    order = order[stable_order(feature[order])]
    feature, token, value = feature[order], token[order], value[order]
    first = _firsts(feature, token)
    count = np.diff(first, append=len(feature))
    if not len(first):
        return Pairs(feature, token, count, value, value)
    sums, largest = np.add.reduceat(value, first), np.maximum.reduceat(value, first)
    return Pairs(feature[first], token[first], count, sums, largest)


def spill_pairs(spill: Spill, pairs: Pairs) -> None:
    """Adds the pairs of some whole features; their numbers are larger than those of all added before."""
    if len(pairs.feature):
        spill.append(int(pairs.feature[0]), **vars(pairs))


def top_tokens(stats: dict[str, np.ndarray], pairs: Pairs) -> None:
    """Fills in the token that a feature fires on most often (lowest id on a tie) and its share of the firings."""
    best = np.lexsort((pairs.token, -pairs.count, pairs.feature))
    ids, start = np.unique(pairs.feature[best], return_index=True)
    stats["top_token"][ids] = pairs.token[best][start]
    stats["top_token_share"][ids] = pairs.count[best][start] / stats["count"][ids]


def next_tokens(tokens: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The token after each row [contexts · seq_len]; -1 at the end of a context and before a token that is not kept."""
    after = np.full(tokens.shape, -1, np.int64)
    after[:, :-1] = np.where(keep[:, 1:], tokens[:, 1:].astype(np.int64), -1)
    return after.reshape(-1)


def domains(stats: dict[str, np.ndarray], feature: np.ndarray, domain: np.ndarray) -> None:
    """Fills in the domain that a feature fires in most often (lowest number on a tie) and its share of the firings."""
    known = domain >= 0
    if not known.any():
        return
    n_domains = int(domain.max()) + 1
    ids, index = np.unique(feature, return_inverse=True)
    key = index[known] * n_domains + domain[known]
    table = np.bincount(key, minlength=len(ids) * n_domains).reshape(len(ids), n_domains)
    seen = table.any(axis=1)
    stats["domain_top"][ids[seen]] = table.argmax(axis=1)[seen]
    stats["domain_purity"][ids] = table.max(axis=1) / stats["count"][ids]
