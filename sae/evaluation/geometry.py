"""What the decoder alone shows: how close features are to each other and to single neurons, and to the paper's A/1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from sae.dictionary.directions import DIRECTIONS_AT_ONCE, cosines_with_others, unit
from sae.evaluation.metrics import number

QUERIES = 4096
ON_ONE_NEURON = 0.5

# Bricken et al. 2023, computed from the public visualisation data of 3,927 features of A/1.
A1 = {
    "l0": 4.90,
    "median_density": 7.05e-4,
    "max_density": 1.1e-2,
    "median_max": 8.1,
    "median_top_neuron": 0.239,
    "share_on_one_neuron": 0.010,
    "ce_loss_score_zero": 0.79,
}
# Features by density: lower edge of each half-decade of log10 density.
A1_DENSITY = {
    -8.0: 111,
    -7.5: 84,
    -7.0: 74,
    -6.5: 19,
    -6.0: 10,
    -5.5: 13,
    -5.0: 69,
    -4.5: 189,
    -4.0: 685,
    -3.5: 1118,
    -3.0: 1143,
    -2.5: 408,
    -2.0: 4,
}
FORMULAS = {
    "l0": "Σ of the features' densities",
    "median_density": "median density (firings / kept tokens) of the features that fired",
    "max_density": "largest density",
    "median_max": "median over features that fired of the largest activation, in the model's units",
    "median_top_neuron": "median over features that fired of max |W_dec[i, n]| / ‖W_dec[i]‖",
    "share_on_one_neuron": f"share of them with more than {ON_ONE_NEURON} there",
    "ce_loss_score_zero": "(ce_zero − ce_sae) / (ce_zero − ce_clean)",
}


def nearest_cosines(W_dec: Float[Tensor, "d_sae d_in"], queries: int = QUERIES) -> Float[np.ndarray, " n"]:
    """The largest cosine with another feature's decoder row, for at most `queries` evenly spaced features."""
    directions = unit(W_dec.float())
    n = len(directions)
    if n < 2:
        return np.empty(0)
    chosen = torch.unique(torch.linspace(0, n - 1, min(n, queries)).round().long())
    parts = torch.split(chosen, DIRECTIONS_AT_ONCE)
    return torch.cat([cosines_with_others(directions, part).amax(-1) for part in parts]).double().numpy()


def top_neuron(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[np.ndarray, " d_sae"]:
    """How much of each feature's direction lies on a single neuron: max |d_n| / ‖d‖."""
    return unit(W_dec.float()).abs().amax(-1).double().numpy()


def geometry(W_dec: Float[Tensor, "d_sae d_in"], fired: Bool[np.ndarray, " d_sae"]) -> dict[str, Any]:
    """Nearest neighbours among the features that fired, and how much of each lies on one neuron."""
    alive = W_dec[torch.from_numpy(fired)]
    return {
        "nearest_cosine": _quantiles(nearest_cosines(alive)),
        "top_neuron": _quantiles(top_neuron(alive)),
        "formula": "over features that fired: largest decoder cosine with another of them "
        f"(at most {QUERIES:,} asked, evenly spaced); max |W_dec[i, n]| / ‖W_dec[i]‖ over neurons n",
        "version": 1,
    }


def a1_match(
    count: Integer[np.ndarray, " d_sae"],
    tokens: int,
    largest: Float[np.ndarray, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    score: float | None,
) -> dict[str, Any]:
    """Statistics of this dictionary next to those of the paper's published A/1 (4,096 features of 512 neurons).

    `largest` is the largest activation of each feature, `score` the ce_loss_score_zero.
    """
    fired = count > 0
    density = count / max(1, tokens)
    neurons = top_neuron(W_dec[torch.from_numpy(fired)])
    edges = np.append(np.arange(-8, 0, 0.5), 0.0)
    ours = {
        "l0": density.sum(),
        "median_density": np.median(density[fired]) if fired.any() else np.nan,
        "max_density": density.max(initial=0.0),
        "median_max": np.median(largest[fired]) if fired.any() else np.nan,
        "median_top_neuron": np.median(neurons) if len(neurons) else np.nan,
        "share_on_one_neuron": (neurons > ON_ONE_NEURON).mean() if len(neurons) else np.nan,
        "ce_loss_score_zero": np.nan if score is None else score,
    }
    histogram, _ = np.histogram(np.log10(density[fired]), bins=edges)
    return {
        "source": "A/1 of Bricken et al. 2023 (another model and text: a yardstick, not a rival)",
        "statistics": {name: {"value": number(ours[name]), "a1": A1[name], "formula": FORMULAS[name]} for name in A1},
        "density": {
            "log10_from": edges[:-1].tolist(),
            "features": histogram.tolist(),
            "a1": [A1_DENSITY.get(edge, 0) for edge in edges[:-1].tolist()],
        },
    }


def _quantiles(values: Float[np.ndarray, " n"]) -> dict[str, float | None]:
    names, points = ("p5", "p25", "median", "p75", "p95"), [5, 25, 50, 75, 95]
    if not len(values):
        return dict.fromkeys(names)
    return {name: float(q) for name, q in zip(names, np.percentile(values, points), strict=True)}
