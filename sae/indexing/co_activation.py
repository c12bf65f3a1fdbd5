"""Which features fire together and which fire next, from the sorted activations of an index; numpy only.

Each feature is represented by at most `SAMPLE_ROWS` of its firings, evenly spaced over the text from a random start, so
the cost grows with the number of active features. A feature with no more firings than that is counted exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae.indexing.correlation import Moments, pearson
from sae.indexing.firings import Firings, next_token_is_kept, systematic_sample
from sae.jobs.progress import progress

SAMPLE_ROWS = 256
LISTED = 10
MIN_TOGETHER = 3  # sampled rows on which two features must both fire to be listed for each other
CELLS_AT_ONCE = 1 << 22


def panels(firings: Firings, *, seed: int = 0) -> dict[str, np.ndarray]:
    """`together` (Jaccard of firing), `correlated` (Pearson of activations), `successors` (share of the next tokens).

    With n_f the firings of f, n_fg the rows where f and g both fire (scaled up from the sample) and N the kept rows:
    jaccard = n_fg / (n_f + n_g − n_fg); pearson = (E fg − E f E g) / (σ_f σ_g);
    share = P(g fires on the next token | f fires), lift = share / density of g; ranked by share − density.
    Each panel is [d_sae, LISTED]; an id is -1 where fewer features qualify.
    """
    totals = _Totals.of(firings)
    parts: dict[str, list[np.ndarray]] = {}
    with progress("features together", len(totals.firings), "features") as bar:
        for sample in _samples(firings, seed):
            found = _fires_together(firings, totals, sample) | _fires_next(firings, totals, sample)
            for name, array in found.items():
                parts.setdefault(name, []).append(array)
            bar.update(sample.n)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


class _Totals(NamedTuple):
    """Exact statistics of every feature over the kept rows."""

    n_rows: int
    firings: Float[np.ndarray, " d_sae"]  # number of firings
    moments: Moments

    @classmethod
    def of(cls, firings: Firings) -> _Totals:
        n_rows = max(1, int(firings.keep.sum()))
        mean, mean_square = (np.zeros(len(firings.ptr) - 1) for _ in range(2))
        for f, (start, stop) in enumerate(zip(firings.ptr[:-1], firings.ptr[1:], strict=True)):
            values = np.asarray(firings.values[start:stop], np.float64)
            mean[f], mean_square[f] = values.sum() / n_rows, (values**2).sum() / n_rows
        return cls(n_rows, np.diff(firings.ptr).astype(np.float64), Moments.of_means(mean, mean_square))


class _Sample(NamedTuple):
    """Sampled firings of the n features from `first` on; `feature` counts from `first`."""

    first: int
    n: int
    feature: Int[np.ndarray, " firings"]
    row: Int[np.ndarray, " firings"]
    value: Float[np.ndarray, " firings"]

    @property
    def features(self) -> slice:
        return slice(self.first, self.first + self.n)

    @property
    def size(self) -> Int[np.ndarray, "n 1"]:
        """Sampled firings of each feature, at least 1."""
        return np.maximum(np.bincount(self.feature, minlength=self.n)[:, None], 1)

    def where(self, chosen: Bool[np.ndarray, " firings"]) -> _Sample:
        return self._replace(feature=self.feature[chosen], row=self.row[chosen], value=self.value[chosen])


def _samples(firings: Firings, seed: int) -> Iterator[_Sample]:
    """Samples of successive blocks of features, small enough for a [block, d_sae] table."""
    d_sae = len(firings.ptr) - 1
    rng = np.random.default_rng(seed)
    at_once = max(1, CELLS_AT_ONCE // d_sae)
    for first in range(0, d_sae, at_once):
        n = min(at_once, d_sae - first)
        places = []
        for f in range(first, first + n):
            start, stop = int(firings.ptr[f]), int(firings.ptr[f + 1])
            places.append(start + systematic_sample(stop - start, SAMPLE_ROWS, rng))
        feature = np.repeat(np.arange(n), [len(place) for place in places])
        place = np.concatenate(places)
        rows, values = np.asarray(firings.rows[place]).astype(np.int64), np.asarray(firings.values[place], np.float64)
        yield _Sample(first, n, feature, rows, values)


def _fires_together(firings: Firings, totals: _Totals, sample: _Sample) -> dict[str, np.ndarray]:
    """The panels `together` and `correlated` of the sampled features."""
    met, products = _meetings(firings, sample, sample.row)
    met[np.arange(sample.n), np.arange(sample.first, sample.first + sample.n)] = 0  # no feature is listed for itself
    enough = met >= MIN_TOGETHER
    count = totals.firings[sample.features, None]
    scale = count / sample.size
    both = met * scale
    jaccard = np.where(enough, both / np.maximum(count + totals.firings - both, 1), -np.inf)
    mine = Moments(totals.moments.mean[sample.features], totals.moments.std[sample.features])
    varies = np.outer(mine.std > 0, totals.moments.std > 0)
    correlation = np.where(enough & varies, pearson(products * scale, totals.n_rows, mine, totals.moments), -np.inf)
    together, together_value = _largest(np.minimum(jaccard, 1.0))
    correlated, correlated_value = _largest(correlation)
    return {
        "together/id": together,
        "together/jaccard": together_value,
        "correlated/id": correlated,
        "correlated/pearson": correlated_value,
    }


def _fires_next(firings: Firings, totals: _Totals, sample: _Sample) -> dict[str, np.ndarray]:
    """The panel `successors` of the sampled features."""
    sample = sample.where(next_token_is_kept(firings, sample.row))
    met, _ = _meetings(firings, sample, sample.row + 1)
    density = totals.firings / totals.n_rows
    ids, gain = _largest(np.where(met >= MIN_TOGETHER, met / sample.size - density, -np.inf))
    share = np.where(ids >= 0, gain + density[ids], 0.0)
    lift = np.where(ids >= 0, share / np.maximum(density[ids], 1e-12), 0.0)
    return {
        "successors/id": ids,
        "successors/share": share.astype(np.float32),
        "successors/lift": lift.astype(np.float32),
    }


def _meetings(
    firings: Firings, sample: _Sample, rows: Int[np.ndarray, " firings"]
) -> tuple[Int[np.ndarray, "n d_sae"], Float[np.ndarray, "n d_sae"]]:
    """On how many of the sample's `rows` each feature fires, and Σ of the products of the two activations."""
    d_sae = len(firings.ptr) - 1
    starts = np.asarray(firings.row_ptr[rows]).astype(np.int64)
    lengths = np.asarray(firings.row_ptr[rows + 1]).astype(np.int64) - starts
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = np.repeat(starts, lengths) + within
    cell = np.repeat(sample.feature, lengths) * d_sae + np.asarray(firings.row_features[place]).astype(np.int64)
    product = np.repeat(sample.value, lengths) * np.asarray(firings.row_values[place], np.float64)
    n_cells = sample.n * d_sae
    met = np.bincount(cell, minlength=n_cells).reshape(sample.n, d_sae)
    products = np.bincount(cell, weights=product, minlength=n_cells).astype(np.float64)  # no firing gives integers
    return met, products.reshape(sample.n, d_sae)


def _largest(scores: Float[np.ndarray, "n d_sae"]) -> tuple[Int[np.ndarray, "n listed"], Float[np.ndarray, "n listed"]]:
    """Ids and values of the `LISTED` largest scores of each row, largest first; id -1, value 0 for a score of −inf."""
    width = min(LISTED, scores.shape[1])
    ids = np.argpartition(-scores, width - 1, axis=1)[:, :width]
    values = np.take_along_axis(scores, ids, 1)
    order = np.lexsort((ids, -values), axis=1)
    ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
    missing = np.isneginf(values)
    return np.where(missing, -1, ids).astype(np.int32), np.where(missing, 0.0, values).astype(np.float32)
