"""The metrics of eval.json that are ratios of sums over tokens: formulas, versions, traps, and bootstrap intervals.

To add such a metric: give it an entry in METRICS; if it needs a new sum, name the sum in SUMS and compute it for each
position in `ratio_metrics.position_sums`. Its value, its interval and its value in each domain follow.

All sums are float64. A ratio is taken once, over the whole data set, and never averaged over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import Int

MIN_ABLATION_GAP_NATS = 0.2
RESAMPLES = 1000
MAX_GROUPS = 16_384  # up to here the bootstrap draws single contexts; beyond, groups of neighbouring contexts

Sums = dict[str, np.ndarray]  # by the names of SUMS
Numbers = float | np.ndarray  # one number, or one for each draw of the bootstrap


@dataclass(frozen=True)
class Metric:
    """A number computed from named sums.

    `formula` is written next to the value in eval.json; `trap` says how the number misleads. Raise `version` whenever
    the formula changes.
    """

    formula: str
    of: Callable[[Mapping[str, Any]], np.ndarray]
    trap: str
    version: int = 1


def _ratio(top: Numbers, bottom: Numbers) -> np.ndarray:
    """top / bottom; NaN where bottom is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0, np.nan, top / np.where(bottom == 0, 1, bottom))


CE = {
    "clean": "the model as it is",
    "sae": "x replaced by x̂",
    "zero": "x replaced by 0",
    "mean": "x replaced by the mean training row",
    "resample": "x replaced by that of a training token drawn at random",
    "units": "x replaced by its `units.k` largest units",
}
ABLATIONS = ("zero", "mean", "resample")
UNITS_TRAP = "The other units are set to 0. Where they have a large mean, a baseline that keeps their mean is stronger."
CE_TRAP = "Depends on the text: compare only values measured on the same held-out tokens."
SCORE_TRAPS = {
    "zero": "Zero is far from any real x, so ce_zero is high and the score flatters; read it next to the score against "
    "the mean.",
    "mean": "Its denominator is smaller than that of the score against zero: the two scores are not comparable.",
    "resample": "The replaced rows are drawn with a fixed seed; another draw gives a slightly different score.",
}
NOISE = f" Noise where the ablation costs less than {MIN_ABLATION_GAP_NATS} nats (`checks.scores_are_noise`)."


def _ce(which: str) -> Metric:
    return Metric(
        f"mean next-token cross-entropy in nats over kept tokens, {CE[which]}",
        lambda s: _ratio(s[f"ce_{which}"], s["predictions"]),
        CE_TRAP,
    )


def _score(ablation: str, which: str = "sae") -> Metric:
    return Metric(
        f"(ce_{ablation} − ce_{which}) / (ce_{ablation} − ce_clean); 1 is perfect",
        lambda s: _ratio(s[f"ce_{ablation}"] - s[f"ce_{which}"], s[f"ce_{ablation}"] - s["ce_clean"]),
        SCORE_TRAPS[ablation] + NOISE,
    )


METRICS: dict[str, Metric] = {
    "l0": Metric(
        "mean number of features with f > 0 per kept token",
        lambda s: _ratio(s["l0"], s["rows"]),
        "A mean: a few tokens with very many active features raise it. Read the quantiles as well.",
    ),
    "fvu": Metric(
        "Σ‖x−x̂‖² / Σ‖x−μ‖², μ the mean held-out row",
        lambda s: _ratio(s["error"], s["variance"]),
        "Rows with a large norm dominate both sums; a small FVU does not mean that the model still predicts well.",
    ),
    "fvu_without_outliers": Metric(
        "Σ‖x−x̂‖² / Σ‖x−μ'‖² over rows with ‖x‖ ≤ 10 × the median norm, μ' their mean",
        lambda s: _ratio(s["inlier_error"], s["inlier_variance"]),
        "The dictionary was trained on the outliers as well, unless its row filter leaves them out.",
    ),
    "outlier_share": Metric(
        "share of rows with ‖x‖ > 10 × the median norm",
        lambda s: _ratio(s["rows"] - s["inlier_rows"], s["rows"]),
        "A row just below the limit counts as ordinary.",
    ),
    "outlier_variance_share": Metric(
        "Σ‖x−μ‖² over rows with ‖x‖ > 10 × the median norm / Σ‖x−μ‖², μ the mean held-out row",
        lambda s: _ratio(s["outlier_variance"], s["variance"]),
        "Above 0.1, read fvu_without_outliers in place of fvu.",
    ),
    "cosine": Metric(
        "mean of x·x̂ / (‖x‖‖x̂‖) over rows",
        lambda s: _ratio(s["cosine"], s["rows"]),
        "Blind to scale: x̂ and x̂ / 2 have the same cosine.",
    ),
    "relative_norm": Metric(
        "Σ‖x̂‖ / Σ‖x‖; below 1: shrinkage",
        lambda s: _ratio(s["norm_hat"], s["norm"]),
        "An imperfect x̂ is shorter than x even without shrinkage; see shrinkage.",
    ),
    "shrinkage": Metric(
        "γ = Σ‖x̂‖² / Σ x·x̂; 1 means no shrinkage (Rajamanoharan et al. 2024)",
        lambda s: _ratio(s["hat_hat"], s["x_hat"]),
        "Says how x̂ is scaled, not whether its direction is right.",
    ),
    **{f"ce_{which}": _ce(which) for which in CE},
    "delta_ce": Metric(
        "ce_sae − ce_clean, nats",
        lambda s: _ratio(s["ce_sae"] - s["ce_clean"], s["predictions"]),
        "Small at any hook point that matters little: compare it with ce_zero − ce_clean at the same hook point.",
    ),
    "kl": Metric(
        "mean KL(model as it is ‖ x replaced by x̂) of the next-token distributions, nats",
        lambda s: _ratio(s["kl"], s["predictions"]),
        "Counts every change of the distribution: delta_ce can be near 0 where kl is not.",
    ),
    **{f"ce_loss_score_{ablation}": _score(ablation) for ablation in ABLATIONS},
    "units_l0": Metric(
        "mean number of the layer's own units (the entries of x) that are not 0 per kept token",
        lambda s: _ratio(s["units_l0"], s["rows"]),
        "Counts every entry that is not exactly 0: in a residual stream or after a GELU, all of them. Read "
        "units_participation_ratio there.",
    ),
    "units_participation_ratio": Metric(
        "mean over kept tokens of (Σa²)² / Σa⁴, a the entries of x; 0 where all are 0 (Bell & Dean 1970)",
        lambda s: _ratio(s["units_participation"], s["rows"]),
        "How many units of equal size would be as concentrated: one very large unit makes it small, however many "
        "others are active.",
    ),
    "topk_units_l0": Metric(
        "mean number of the `units.k` largest units, by |a|, that are not 0 per kept token",
        lambda s: _ratio(s["topk_units_l0"], s["rows"]),
        "Lower than k where a token has fewer than k active units.",
    ),
    "topk_units_fvu": Metric(
        "fvu with x̂ = the `units.k` largest units of x, by |a|; k is l0, rounded, at least 1",
        lambda s: _ratio(s["topk_units_error"], s["variance"]),
        UNITS_TRAP,
    ),
    "topk_units_delta_ce": Metric(
        "ce_units − ce_clean, nats", lambda s: _ratio(s["ce_units"] - s["ce_clean"], s["predictions"]), UNITS_TRAP
    ),
    **{f"topk_units_ce_loss_score_{ablation}": _score(ablation, "units") for ablation in ABLATIONS},
    "ce_gain_over_units": Metric(
        "ce_units − ce_sae, nats: what the dictionary keeps beyond as many of the layer's own units",
        lambda s: _ratio(s["ce_units"] - s["ce_sae"], s["predictions"]),
        "Not above 0: the dictionary shows nothing that the units do not. It grows with the damage that the ablation "
        "of the hook point does.",
    ),
}
# Those that need the model's losses, and are left out where the activations came without a model.
OF_LOSSES = frozenset(name for name in METRICS if "ce" in name.split("_") or name == "kl")
SUMS = {
    "rows": "1 for each kept token",
    "predictions": "1 for each kept token that is followed by a kept token",
    "l0": "number of active features",
    "error": "‖x − x̂‖²",
    "variance": "‖x − μ‖², μ the mean held-out row",
    "inlier_rows": "1 for each row with ‖x‖ ≤ 10 × the median norm",
    "inlier_error": "‖x − x̂‖² of these",
    "inlier_variance": "‖x − μ'‖² of these, μ' their mean",
    "outlier_variance": "‖x − μ‖² of the other rows",
    "cosine": "x·x̂ / (‖x‖‖x̂‖)",
    "hat_hat": "‖x̂‖²",
    "x_hat": "x·x̂",
    "norm": "‖x‖",
    "norm_hat": "‖x̂‖",
    **{f"ce_{which}": f"next-token cross-entropy in nats, {what}" for which, what in CE.items()},
    "kl": "KL of the two next-token distributions, nats",
    "units_l0": "number of units that are not 0",
    "units_participation": "(Σa²)² / Σa⁴ of the units",
    "topk_units_l0": "number of the k largest units that are not 0",
    "topk_units_error": "‖x − its k largest units‖²",
}


def measurable(sums: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics that these sums are enough for."""
    return {name: metric for name, metric in METRICS.items() if "predictions" in sums or name not in OF_LOSSES}


class Bootstrap:
    """Draws of contexts with replacement, shared by all metrics and groups; drawn once, from a seed.

    Above MAX_GROUPS contexts, neighbouring contexts are drawn together. That bounds memory; it can only widen the
    intervals.
    """

    def __init__(self, n_contexts: int, *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.contexts_per_group = max(1, -(-n_contexts // MAX_GROUPS))
        groups = -(-n_contexts // self.contexts_per_group)
        rng = np.random.default_rng(seed)
        self._weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float64)

    def drawn(self, sums: Sums, context: Int[np.ndarray, " n"]) -> Sums:
        """The sums of each draw; `sums[name][i]` belongs to context `context[i]`."""
        group, column = np.unique(context // self.contexts_per_group, return_inverse=True)
        weights = self._weights[:, group]
        return {name: weights @ np.bincount(column, values, minlength=len(group)) for name, values in sums.items()}


def summarise(sums: Sums, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The value of each metric with its 95% bootstrap interval over contexts; `sums[name]` is [n_contexts]."""
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
        for name, metric in measurable(sums).items()
    }


def by_group(
    sums: Sums, context: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"], n_groups: int, bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    """Every metric's value in each group, with the intervals under "ci95".

    `sums[name][i]` is what context `context[i]` adds to group `group[i]`.
    """
    found: list[dict[str, Any]] = []
    for index in range(n_groups):
        mine = group == index
        part = {name: values[mine] for name, values in sums.items()}
        whole = {name: values.sum() for name, values in part.items()}
        values = {name: number(metric.of(whole)) for name, metric in measurable(sums).items()}
        found.append(values | {"ci95": _intervals(part, context[mine], bootstrap)})
    return found


def _intervals(sums: Sums, context: Int[np.ndarray, " n"], bootstrap: Bootstrap) -> dict[str, list[float | None]]:
    drawn = bootstrap.drawn(sums, context)
    found: dict[str, list[float | None]] = {}
    for name, metric in measurable(sums).items():
        values = metric.of(drawn)
        defined = values[np.isfinite(values)]
        low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
        found[name] = [number(low), number(high)]
    return found


def number(value: SupportsFloat) -> float | None:
    """A number that JSON can hold: NaN and infinity (nothing to divide by) become null."""
    found = float(value)
    return found if np.isfinite(found) else None
