"""What each feature does over the held-out tokens: how often it fires, how strongly, in which domains."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sae.evaluation.metrics import number

ULTRA_LOW_DENSITY = 1e-5
L0_QUANTILES = (1, 5, 25, 50, 75, 95, 99)
L0_BINS = 32


class Firings:
    """Every activation of the kept tokens: its feature, its value, and the place (of `n_places`) it happened in."""

    def __init__(self, d_sae: int, n_places: int = 1) -> None:
        self.n_places = n_places
        self.count = np.zeros(d_sae, np.int64)
        self.largest = np.zeros(d_sae, np.float32)
        self.tokens = np.zeros(n_places, np.int64)  # kept tokens of each place
        self._features: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._places: list[np.ndarray] = []
        self._l0: list[np.ndarray] = []

    def add(self, features: Int[Tensor, " n"], values: Tensor, places: Int[np.ndarray, " n"] | None = None) -> None:
        """Activations of kept rows, in any order; what is not positive is none."""
        fired = values > 0
        self._features.append(features[fired].numpy().astype(np.uint32))
        self._values.append(values[fired].float().numpy())
        if places is not None:
            self._places.append(places[fired.numpy()].astype(np.uint16))
        self.count += np.bincount(self._features[-1], minlength=len(self.count))
        np.maximum.at(self.largest, self._features[-1], self._values[-1])

    def add_rows(self, l0: Int[Tensor, " rows"], places: Int[np.ndarray, " rows"]) -> None:
        """Active features and place of each kept row."""
        self.tokens += np.bincount(places, minlength=self.n_places)
        self._l0.append(np.bincount(l0.numpy()))

    def by_place(self) -> np.ndarray:
        """Firings of each feature in each place, [d_sae, n_places]."""
        table = np.zeros(len(self.count) * self.n_places, np.int64)
        for features, places in zip(self._features, self._places, strict=True):
            cells, counts = np.unique(features.astype(np.int64) * self.n_places + places, return_counts=True)
            table[cells] += counts
        return table.reshape(len(self.count), self.n_places)

    def statistics(self) -> dict[str, Tensor]:
        """count, max, mean and P99 (both over the firings) per feature; zero where a feature never fired."""
        features = np.concatenate([np.empty(0, np.uint32), *self._features])
        values = np.concatenate([np.empty(0, np.float32), *self._values])
        order = np.lexsort((values, features))
        features, values = features[order], values[order]
        ends = np.cumsum(self.count)
        fired = self.count > 0
        p99 = np.zeros_like(self.largest)
        # The smallest value with at least 99% of the firings at or below it.
        place = (ends - self.count + np.ceil(0.99 * self.count).astype(np.int64) - 1)[fired]
        p99[fired] = values[place]
        sums = np.bincount(features, values, minlength=len(self.count)).astype(np.float64)  # int64 of nothing
        mean = np.divide(sums, self.count, out=np.zeros_like(sums), where=fired)
        return {
            "count": torch.from_numpy(self.count.copy()),
            "max": torch.from_numpy(self.largest.copy()),
            "mean": torch.from_numpy(mean.astype(np.float32)),
            "p99": torch.from_numpy(p99),
        }

    def l0(self) -> dict[str, Any]:
        """How many features the kept tokens have active: exact quantiles and a histogram in equal bins."""
        tokens = np.zeros(max((len(part) for part in self._l0), default=1), np.int64)  # tokens with n active features
        for part in self._l0:
            tokens[: len(part)] += part
        width = max(1, -(-len(tokens) // L0_BINS))
        cumulated = np.cumsum(tokens)
        return {
            "quantiles": {
                f"p{q}": int(np.searchsorted(cumulated, q / 100 * cumulated[-1])) if cumulated[-1] else None
                for q in L0_QUANTILES
            },
            "histogram": {
                "active_features_from": list(range(0, len(tokens), width)),
                "tokens": np.add.reduceat(tokens, np.arange(0, len(tokens), width)).tolist(),
            },
            "formula": "active features per kept token; pN: the smallest n with N% of the tokens at n or below",
        }


def firing_summary(count: np.ndarray, tokens: int) -> dict[str, dict[str, Any]]:
    """dead_share and ultra_low_share from how often each feature fired over `tokens` kept tokens."""
    density = count / max(1, tokens)
    dead = count == 0
    enough = tokens * ULTRA_LOW_DENSITY > 1  # else a feature that fired once is above it already
    return {
        "dead_share": {
            "value": float(dead.mean()),
            "ci95": None,
            "formula": f"share of features with no firing in these {tokens:,} kept held-out tokens",
            "version": 1,
        },
        "ultra_low_share": {
            "value": float((~dead & (density < ULTRA_LOW_DENSITY)).mean()) if enough else None,
            "ci95": None,
            "formula": f"share of features that fired, with density < {ULTRA_LOW_DENSITY:g} firings per kept token"
            + ("" if enough else f"; needs more than {1 / ULTRA_LOW_DENSITY:,.0f} tokens"),
            "version": 2,
        },
    }


def density_histogram(count: np.ndarray, tokens: int, *, per_decade: int = 4) -> dict[str, list[float]]:
    """Histogram of log10 density of the features that fired, from 1e-8 to 1, plus the number of dead ones."""
    edges = np.linspace(-8, 0, 8 * per_decade + 1)
    density = count[count > 0] / max(1, tokens)
    counts, _ = np.histogram(np.log10(density), bins=edges) if len(density) else (np.zeros(len(edges) - 1), None)
    return {
        "log10_density_edges": edges.tolist(),
        "features": [int(c) for c in counts],
        "dead": [int((count == 0).sum())],
    }


def by_density(count: np.ndarray, tokens: int, b_enc: np.ndarray, d_dot_e: np.ndarray) -> list[dict[str, Any]]:
    """Features by decade of density with the median b_enc and d·e of each: what sets an ultra-low cluster apart.

    Source: Bricken et al. 2023, "Feature density histograms": the clusters part in (log density, b_e, d_i · e_i).
    """
    decade = np.floor(np.log10(np.maximum(count, 1) / max(1, tokens)))
    found = []
    for which in [None, *np.unique(decade[count > 0]).astype(int).tolist()]:
        mine = (count == 0) if which is None else (count > 0) & (decade == which)
        found.append(
            {
                "log10_density_from": which,  # null: never fired
                "features": int(mine.sum()),
                "median_b_enc": number(np.median(b_enc[mine]) if mine.any() else np.nan),
                "median_d_dot_e": number(np.median(d_dot_e[mine]) if mine.any() else np.nan),
            }
        )
    return found
