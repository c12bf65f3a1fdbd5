"""Every number of eval.json: its formula, its version, and how it follows from sums over contexts.

All sums are float64; a ratio is taken once, over the whole data set, never averaged over batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MIN_ABLATION_GAP_NATS = 0.2
ULTRA_LOW_DENSITY = 1e-5


@dataclass(frozen=True)
class Metric:
    """A number computed from named sums; `formula` is printed next to its value."""

    formula: str
    of: Callable[[dict[str, np.ndarray]], np.ndarray]
    version: int = 1


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0, np.nan, top / np.where(bottom == 0, 1, bottom))


def _ce(which: str) -> Metric:
    what = {
        "clean": "the model as it is",
        "sae": "x replaced by x̂",
        "zero": "x replaced by 0",
        "mean": "x replaced by the mean training row",
    }[which]
    return Metric(
        f"mean next-token cross-entropy in nats over kept tokens, {what}",
        lambda s: _ratio(s[f"ce_{which}"], s["predictions"]),
    )


def _score(ablation: str) -> Metric:
    return Metric(
        f"(ce_{ablation} − ce_sae) / (ce_{ablation} − ce_clean); 1 is perfect",
        lambda s: _ratio(s[f"ce_{ablation}"] - s["ce_sae"], s[f"ce_{ablation}"] - s["ce_clean"]),
    )


METRICS: dict[str, Metric] = {
    "l0": Metric("mean number of features with f > 0 per kept token", lambda s: _ratio(s["l0"], s["rows"])),
    "fvu": Metric("Σ‖x−x̂‖² / Σ‖x−μ‖², μ the mean held-out row", lambda s: _ratio(s["error"], s["variance"])),
    "cosine": Metric("mean of x·x̂ / (‖x‖‖x̂‖) over rows", lambda s: _ratio(s["cosine"], s["rows"])),
    "shrinkage": Metric(
        "Σ‖x̂‖² / Σ x·x̂; 1 means no shrinkage (Rajamanoharan et al. 2024)", lambda s: _ratio(s["hat_hat"], s["x_hat"])
    ),
    "ce_clean": _ce("clean"),
    "ce_sae": _ce("sae"),
    "ce_zero": _ce("zero"),
    "ce_mean": _ce("mean"),
    "delta_ce": Metric("ce_sae − ce_clean, nats", lambda s: _ratio(s["ce_sae"] - s["ce_clean"], s["predictions"])),
    "ce_loss_score_zero": _score("zero"),
    "ce_loss_score_mean": _score("mean"),
}
SUMS = (
    "rows", "predictions", "l0", "error", "variance", "cosine", "hat_hat", "x_hat",
    "ce_clean", "ce_sae", "ce_zero", "ce_mean",
)  # fmt: skip


def summarise(sums: dict[str, np.ndarray], *, resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, object]]:
    """Values with 95% bootstrap intervals over contexts. `sums[name]` is [n_contexts]."""
    n_contexts = len(sums["rows"])
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n_contexts, np.full(n_contexts, 1 / n_contexts), size=resamples).astype(np.float64)
    drawn = {name: weights @ per_context for name, per_context in sums.items()}
    whole = {name: per_context.sum() for name, per_context in sums.items()}
    result: dict[str, dict[str, object]] = {}
    for name, metric in METRICS.items():
        values = metric.of(drawn)
        defined = values[np.isfinite(values)]
        low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
        result[name] = {
            "value": number(metric.of(whole)),
            "ci95": [number(low), number(high)],
            "formula": metric.formula,
            "version": metric.version,
        }
    return result


def number(value: object) -> float | None:
    """A JSON number: NaN (nothing to divide by) becomes null."""
    found = float(np.asarray(value))
    return found if np.isfinite(found) else None


def by_group(sums: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """Metric values from plain sums of each group (`sums[name]` is [n_groups]), one dict per group."""
    values = {name: metric.of(sums) for name, metric in METRICS.items()}
    return {
        str(group): {name: number(column[group]) for name, column in values.items()}
        for group in range(len(sums["rows"]))
    }


def firing_summary(count: np.ndarray, tokens: int) -> dict[str, dict[str, object]]:
    """dead_share and ultra_low_share from how often each feature fired over `tokens` kept tokens."""
    density = count / max(1, tokens)
    dead = count == 0
    return {
        "dead_share": {
            "value": float(dead.mean()),
            "ci95": None,
            "formula": f"share of features with no firing in these {tokens:,} kept held-out tokens",
            "version": 1,
        },
        "ultra_low_share": {
            "value": float((~dead & (density < ULTRA_LOW_DENSITY)).mean()),
            "ci95": None,
            "formula": f"share of features that fired, with density < {ULTRA_LOW_DENSITY:g} firings per kept token",
            "version": 1,
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
