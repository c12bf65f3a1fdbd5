"""What fires together and what fires next, from the sorted activations of an index; numpy only.

Each feature is represented by at most `SAMPLE_ROWS` of its firings, spread evenly over the text from a random start, so
the cost follows the active features; a feature with fewer firings is counted exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from sae.jobs.progress import progress

SAMPLE_ROWS = 256
LISTED = 10
MIN_TOGETHER = 3  # sampled rows two features must share before they are called similar
CELLS_AT_ONCE = 1 << 22


class Firings(Protocol):
    """Every activation by feature and by row, with its text; `store.feature_sort.SortedFirings` is one."""

    @property
    def ptr(self) -> np.ndarray: ...
    @property
    def rows(self) -> np.ndarray: ...
    @property
    def values(self) -> np.ndarray: ...
    @property
    def row_ptr(self) -> np.ndarray: ...
    @property
    def row_features(self) -> np.ndarray: ...
    @property
    def row_values(self) -> np.ndarray: ...
    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def keep(self) -> np.ndarray: ...
    @property
    def domain(self) -> np.ndarray: ...


class _Sample(NamedTuple):
    """Sampled firings of the features `first ..`: which feature (counted from `first`), where, how strongly."""

    feature: np.ndarray
    row: np.ndarray
    value: np.ndarray


def panels(firings: Firings, *, seed: int = 0) -> dict[str, np.ndarray]:
    """`together` (Jaccard of firing), `correlated` (Pearson of activations), `successors` (share of the next tokens).

    With n_f the firings of f, n_fg the rows where f and g both fire (scaled up from the sample) and N the kept rows:
    jaccard = n_fg / (n_f + n_g − n_fg); pearson = (E fg − E f E g) / (σ_f σ_g);
    share = P(g fires on the next token | f fires), lift = share / density of g; ranked by share − density.
    Ids are -1 where fewer than `LISTED` features qualify.
    """
    d_sae = len(firings.ptr) - 1
    n_rows = max(1, int(firings.keep.sum()))
    count = np.diff(firings.ptr).astype(np.float64)
    mean, mean_square = _means(firings, n_rows)
    std = np.sqrt(np.maximum(mean_square - mean**2, 0.0))
    keep = firings.keep.reshape(-1)
    seq_len = firings.keep.shape[1]
    found: dict[str, list[np.ndarray]] = {}

    def put(name: str, **columns: np.ndarray) -> None:
        for column, array in columns.items():
            found.setdefault(f"{name}/{column}", []).append(array)

    with progress("features together", d_sae, "features") as bar:
        for first, sample in _samples(firings, seed):
            width = _width(d_sae)
            n = min(width, d_sae - first)
            own = np.arange(n), np.arange(first, first + n)
            n_f = count[first : first + n, None]
            sampled = np.bincount(sample.feature, minlength=n)[:, None]
            scale = n_f / np.maximum(sampled, 1)
            met, weighted = _meet(firings, sample, sample.row, n, d_sae)
            met[own] = 0
            enough = met >= MIN_TOGETHER
            both = met * scale
            jaccard = np.where(enough, both / np.maximum(n_f + count - both, 1), -np.inf)
            put("together", **_best(np.minimum(jaccard, 1.0), "jaccard"))
            covariance = weighted * scale / n_rows - mean[first : first + n, None] * mean
            spread = std[first : first + n, None] * std
            pearson = np.where(enough & (spread > 0), covariance / np.where(spread > 0, spread, 1.0), -np.inf)
            put("correlated", **_best(np.minimum(pearson, 1.0), "pearson"))
            goes_on = sample.row % seq_len < seq_len - 1
            goes_on[goes_on] = keep[sample.row[goes_on] + 1]
            next_sample = _Sample(*(column[goes_on] for column in sample))
            met, _ = _meet(firings, next_sample, next_sample.row + 1, n, d_sae)
            steps = np.maximum(np.bincount(next_sample.feature, minlength=n)[:, None], 1)
            density = count / n_rows
            gain = np.where(met >= MIN_TOGETHER, met / steps - density, -np.inf)
            best = _best(gain, "share")
            share = np.where(best["id"] >= 0, best["share"] + density[best["id"]], 0.0)
            lift = np.where(best["id"] >= 0, share / np.maximum(density[best["id"]], 1e-12), 0.0)
            put("successors", id=best["id"], share=share.astype(np.float32), lift=lift.astype(np.float32))
            bar.update(n)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _means(firings: Firings, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """E[f] and E[f²] over the kept rows [d_sae]."""
    mean, square = (np.zeros(len(firings.ptr) - 1) for _ in range(2))
    for f, (lo, hi) in enumerate(zip(firings.ptr[:-1], firings.ptr[1:], strict=True)):
        values = np.asarray(firings.values[lo:hi], np.float64)
        mean[f], square[f] = values.sum() / n_rows, (values**2).sum() / n_rows
    return mean, square


def _width(d_sae: int) -> int:
    return max(1, CELLS_AT_ONCE // d_sae)


def _samples(firings: Firings, seed: int) -> Iterator[tuple[int, _Sample]]:
    """Blocks of features with their sampled firings."""
    d_sae = len(firings.ptr) - 1
    rng = np.random.default_rng(seed)
    width = _width(d_sae)
    for first in range(0, d_sae, width):
        places, features = [], []
        for f in range(first, min(first + width, d_sae)):
            lo, hi = int(firings.ptr[f]), int(firings.ptr[f + 1])
            places.append(lo + evenly(hi - lo, SAMPLE_ROWS, rng))
            features.append(np.full(len(places[-1]), f - first))
        place = np.concatenate(places)
        rows = np.asarray(firings.rows[place]).astype(np.int64)
        yield first, _Sample(np.concatenate(features), rows, np.asarray(firings.values[place], np.float64))


def evenly(n: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """At most `most` of the numbers 0 … n−1, ascending, each with the same chance (systematic sampling)."""
    if n <= most:
        return np.arange(n)
    return np.minimum(((np.arange(most) + rng.random()) * n / most).astype(np.int64), n - 1)


def _meet(firings: Firings, sample: _Sample, rows: np.ndarray, n: int, d_sae: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, d_sae]: on how many of the sample's `rows` each feature fires, and Σ of the products of activations."""
    starts = np.asarray(firings.row_ptr[rows]).astype(np.int64)
    lengths = np.asarray(firings.row_ptr[rows + 1]).astype(np.int64) - starts
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = np.repeat(starts, lengths) + within
    key = np.repeat(sample.feature, lengths) * d_sae + np.asarray(firings.row_features[place]).astype(np.int64)
    product = np.repeat(sample.value, lengths) * np.asarray(firings.row_values[place], np.float64)
    met = np.bincount(key, minlength=n * d_sae).reshape(n, d_sae)
    return met, np.bincount(key, weights=product, minlength=n * d_sae).reshape(n, d_sae)


def _best(scores: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """The `LISTED` largest scores of each row, largest first; id -1 and 0 where a score is −inf."""
    width = min(LISTED, scores.shape[1])
    ids = np.argpartition(-scores, width - 1, axis=1)[:, :width]
    values = np.take_along_axis(scores, ids, 1)
    order = np.lexsort((ids, -values), axis=1)
    ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
    nothing = np.isneginf(values)
    return {"id": np.where(nothing, -1, ids).astype(np.int32), name: np.where(nothing, 0.0, values).astype(np.float32)}
