"""The metrics of eval.json that are ratios of sums over contexts: their formulas, their versions, their intervals.

All sums are float64; a ratio is taken once, over the whole data set, never averaged over batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_ABLATION_GAP_NATS = 0.2
RESAMPLES = 1000
MAX_GROUPS = 16_384  # contexts resampled one by one up to here; beyond, groups of neighbouring ones


@dataclass(frozen=True)
class Metric:
    """A number computed from named sums; `formula` is printed next to its value."""

    formula: str
    of: Callable[[dict[str, np.ndarray]], np.ndarray]
    version: int = 1


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0, np.nan, top / np.where(bottom == 0, 1, bottom))


CE = {
    "clean": "the model as it is",
    "sae": "x replaced by x̂",
    "zero": "x replaced by 0",
    "mean": "x replaced by the mean training row",
    "resample": "x replaced by that of a training token drawn at random",
}
ABLATIONS = ("zero", "mean", "resample")


def _ce(which: str) -> Metric:
    return Metric(
        f"mean next-token cross-entropy in nats over kept tokens, {CE[which]}",
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
    "relative_norm": Metric("Σ‖x̂‖ / Σ‖x‖; below 1: shrinkage", lambda s: _ratio(s["norm_hat"], s["norm"])),
    "shrinkage": Metric(
        "γ = Σ‖x̂‖² / Σ x·x̂; 1 means no shrinkage (Rajamanoharan et al. 2024)",
        lambda s: _ratio(s["hat_hat"], s["x_hat"]),
    ),
    **{f"ce_{which}": _ce(which) for which in CE},
    "delta_ce": Metric("ce_sae − ce_clean, nats", lambda s: _ratio(s["ce_sae"] - s["ce_clean"], s["predictions"])),
    "kl": Metric(
        "mean KL(model as it is ‖ x replaced by x̂) of the next-token distributions, nats",
        lambda s: _ratio(s["kl"], s["predictions"]),
    ),
    **{f"ce_loss_score_{ablation}": _score(ablation) for ablation in ABLATIONS},
}
SUMS = (
    "rows",
    "predictions",
    "l0",
    "error",
    "variance",
    "cosine",
    "hat_hat",
    "x_hat",
    "norm",
    "norm_hat",
    *(f"ce_{which}" for which in CE),
    "kl",
)
Sums = dict[str, np.ndarray]


class Bootstrap:
    """Draws of contexts with replacement, shared by every metric and group: seeded, all at once.

    Above MAX_GROUPS contexts neighbours are drawn together: that bounds memory and, if anything, widens intervals.
    """

    def __init__(self, n_contexts: int, *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.together = -(-n_contexts // MAX_GROUPS)
        groups = -(-n_contexts // max(1, self.together))
        rng = np.random.default_rng(seed)
        self._weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float64)

    def drawn(self, sums: Sums, context: np.ndarray) -> Sums:
        """The sums of each draw; `sums[name][i]` belongs to context `context[i]`."""
        group, column = np.unique(context // max(1, self.together), return_inverse=True)
        weights = self._weights[:, group]
        return {name: weights @ np.bincount(column, values, minlength=len(group)) for name, values in sums.items()}


def summarise(sums: Sums, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Values with 95% bootstrap intervals over contexts. `sums[name]` is [n_contexts]."""
    n_contexts = len(sums["rows"])
    intervals = _intervals(sums, np.arange(n_contexts), Bootstrap(n_contexts, resamples=resamples, seed=seed))
    whole = {name: per_context.sum() for name, per_context in sums.items()}
    return {
        name: {
            "value": number(metric.of(whole)),
            "ci95": intervals[name],
            "formula": metric.formula,
            "version": metric.version,
        }
        for name, metric in METRICS.items()
    }


def by_group(
    sums: Sums, context: np.ndarray, group: np.ndarray, n_groups: int, bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    """Metric values of each group, with their intervals under "ci95".

    `sums[name][i]` is what context `context[i]` adds to group `group[i]`.
    """
    found: list[dict[str, Any]] = []
    for number_of_group in range(n_groups):
        mine = group == number_of_group
        part = {name: values[mine] for name, values in sums.items()}
        whole = {name: values.sum() for name, values in part.items()}
        values = {name: number(metric.of(whole)) for name, metric in METRICS.items()}
        found.append(values | {"ci95": _intervals(part, context[mine], bootstrap)})
    return found


def _intervals(sums: Sums, context: np.ndarray, bootstrap: Bootstrap) -> dict[str, list[float | None]]:
    drawn = bootstrap.drawn(sums, context)
    found: dict[str, list[float | None]] = {}
    for name, metric in METRICS.items():
        values = metric.of(drawn)
        defined = values[np.isfinite(values)]
        low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
        found[name] = [number(low), number(high)]
    return found


def number(value: object) -> float | None:
    """A JSON number: NaN (nothing to divide by) becomes null."""
    found = float(np.asarray(value))
    return found if np.isfinite(found) else None
