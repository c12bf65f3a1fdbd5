"""What each feature does on the held-out tokens: how often it fires and how strongly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.evaluation.blocks import EvaluatedBlock
from sae.evaluation.metrics import number
from sae.parallel.mesh import Mesh

ULTRA_LOW_DENSITY = 1e-5
L0_QUANTILES = (1, 5, 25, 50, 75, 95, 99)
L0_BINS = 32


class FeatureActivity:
    """Accumulator of the dead and ultra-low shares (`metrics`), `l0`, `density` and `by_density`.

    Its `statistics` become feature_stats.safetensors.
    """

    def __init__(self, sae: SAE, kept_tokens: int) -> None:
        self.statistics, self._l0 = FeatureStatistics(sae.d_sae), L0Histogram()
        self.kept_tokens = kept_tokens
        self._b_enc = sae.b_enc.numpy()
        # The encoder and decoder directions of a transcoder lie in different spaces.
        nothing = torch.full((sae.d_sae,), torch.nan)
        self._d_dot_e = (nothing if sae.is_transcoder else (sae.W_enc.T * sae.W_dec).sum(-1)).numpy()

    def add(self, evaluated: EvaluatedBlock) -> None:
        fired = evaluated.fired
        self.statistics.add(fired.support.features, fired.values)
        self._l0.add(fired.support.offsets.diff()[evaluated.block.keep.flatten()])

    def gather(self, mesh: Mesh) -> None:
        self.statistics.gather(mesh)
        self._l0.gather(mesh)

    def result(self) -> dict[str, Any]:
        count = self.statistics.count
        return {
            "metrics": firing_summary(count, self.kept_tokens),
            "l0": self._l0.summary(),
            "density": density_histogram(count, self.kept_tokens),
            "by_density": by_density(count, self.kept_tokens, self._b_enc, self._d_dot_e),
        }


class FeatureStatistics:
    """Number of firings, largest, mean and 99th-percentile activation of each feature.

    Memory: 8 bytes per firing.
    """

    def __init__(self, d_sae: int) -> None:
        self.count = np.zeros(d_sae, np.int64)
        self.largest = np.zeros(d_sae, np.float32)
        self._features: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, features: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Activations above zero, in any order."""
        self._features.append(features.numpy().astype(np.uint32))
        self._values.append(values.float().numpy())
        self.count += np.bincount(self._features[-1], minlength=len(self.count))
        np.maximum.at(self.largest, self._features[-1], self._values[-1])

    def gather(self, mesh: Mesh) -> None:
        """Takes in, on rank 0, the firings of all ranks: no figure depends on their order."""
        mesh.reduce_(torch.from_numpy(self.count), "sum", "world")
        mesh.reduce_(torch.from_numpy(self.largest), "max", "world")
        if mesh.world > 1:
            self._features = mesh.collected(np.concatenate([np.empty(0, np.uint32), *self._features]))
            self._values = mesh.collected(np.concatenate([np.empty(0, np.float32), *self._values]))

    def tensors(self) -> dict[str, Tensor]:
        """`count`, `max`, `mean` and `p99` (the last two over the firings); zero where a feature never fired."""
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
        sums = np.bincount(features, values, minlength=len(self.count)).astype(np.float64)  # no firing gives integers
        mean = np.divide(sums, self.count, out=np.zeros_like(sums), where=fired)
        return {
            "count": torch.from_numpy(self.count.copy()),
            "max": torch.from_numpy(self.largest.copy()),
            "mean": torch.from_numpy(mean.astype(np.float32)),
            "p99": torch.from_numpy(p99),
        }


class L0Histogram:
    """How many kept tokens have n active features, for every n."""

    def __init__(self) -> None:
        self._tokens = np.zeros(1, np.int64)

    def add(self, active_features: Int[Tensor, " tokens"]) -> None:
        """The number of active features of each kept token."""
        self._add(np.bincount(active_features.numpy()))

    def gather(self, mesh: Mesh) -> None:
        for tokens in mesh.collected(self._tokens)[1:]:
            self._add(tokens)

    def _add(self, tokens: Int[np.ndarray, " n"]) -> None:
        longer, shorter = sorted((tokens, self._tokens), key=len, reverse=True)
        self._tokens = longer.copy()
        self._tokens[: len(shorter)] += shorter

    def summary(self) -> dict[str, Any]:
        """Exact quantiles, and a histogram with bins of equal width."""
        width = max(1, -(-len(self._tokens) // L0_BINS))
        cumulated = np.cumsum(self._tokens)
        edges = np.arange(0, len(self._tokens), width)
        return {
            "quantiles": {
                f"p{q}": int(np.searchsorted(cumulated, q / 100 * cumulated[-1])) if cumulated[-1] else None
                for q in L0_QUANTILES
            },
            "histogram": {
                "active_features_from": edges.tolist(),
                "tokens": np.add.reduceat(self._tokens, edges).tolist(),
            },
            "formula": "active features per kept token; pN: the smallest n with N% of the tokens at n or below",
        }


def firing_summary(count: Integer[np.ndarray, " d_sae"], tokens: int) -> dict[str, dict[str, Any]]:
    """dead_share and ultra_low_share, from how often each feature fired on `tokens` kept tokens."""
    density = count / max(1, tokens)
    dead = count == 0
    enough = tokens * ULTRA_LOW_DENSITY > 1  # with fewer tokens, one firing already gives a higher density
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


def density_histogram(
    count: Integer[np.ndarray, " d_sae"], tokens: int, *, per_decade: int = 4
) -> dict[str, list[float]]:
    """Histogram of log10 density (firings per kept token) from 1e-8 to 1, and the number of dead features."""
    edges = np.linspace(-8, 0, 8 * per_decade + 1)
    density = count[count > 0] / max(1, tokens)
    counts, _ = np.histogram(np.log10(density), bins=edges)
    return {
        "log10_density_edges": edges.tolist(),
        "features": [int(c) for c in counts],
        "dead": [int((count == 0).sum())],
    }


def by_density(
    count: Integer[np.ndarray, " d_sae"],
    tokens: int,
    b_enc: Float[np.ndarray, " d_sae"],
    d_dot_e: Float[np.ndarray, " d_sae"],
) -> list[dict[str, Any]]:
    """Features by decade of density, with the median b_enc and d·e of each: these set an ultra-low cluster apart.

    Source: Bricken et al. 2023, "Feature density histograms": the clusters separate in (log density, b_e, d_i · e_i).
    """
    decade = np.floor(np.log10(np.maximum(count, 1) / max(1, tokens)))
    found = []
    for low in [None, *np.unique(decade[count > 0]).astype(int).tolist()]:
        mine = (count == 0) if low is None else (count > 0) & (decade == low)
        found.append(
            {
                "log10_density_from": low,  # null: never fired
                "features": int(mine.sum()),
                "median_b_enc": number(np.median(b_enc[mine]) if mine.any() else np.nan),
                "median_d_dot_e": number(np.median(d_dot_e[mine]) if mine.any() else np.nan),
            }
        )
    return found
