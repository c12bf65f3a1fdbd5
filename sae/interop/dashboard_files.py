r"""Writes feature pages as SAEDashboard does for Neuronpedia: `batch-N.json` files and `run_settings.json`.

Tokens are strings there; bytes of an incomplete character are written as text (`\xc3`).
Source: SAEDashboard 0.5 to 0.8, `neuronpedia_dashboard.py` (the classes that these files are read into),
`neuronpedia_converter.py` (what the fields hold) and `neuronpedia_runner_config.py` (run_settings.json).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TOP_BIN = (-1.0, -1.0)  # the lower end and the share of the group of the strongest activations


@dataclass(frozen=True)
class Example:
    """A text with the feature's activation on each token. `hit` is the token it was chosen for.

    `low` and `high` bound the activations of its group, `share` is the group's share of all tokens; for the strongest
    activations `low` and `share` are `TOP_BIN`.
    """

    tokens: Sequence[bytes]
    acts: np.ndarray
    hit: int
    low: float
    high: float
    share: float


@dataclass(frozen=True)
class FeaturePage:
    """What is written of one feature. Histograms are (counts, edges); pairs are (token or neuron, value)."""

    feature: int
    density: float
    examples: Sequence[Example]
    acts: tuple[np.ndarray, np.ndarray] | None = None
    logits: tuple[np.ndarray, np.ndarray] | None = None
    raises: Sequence[tuple[bytes, float]] = ()
    lowers: Sequence[tuple[bytes, float]] = ()
    neurons: Sequence[tuple[int, float, float]] = ()  # number, weight, share of the absolute weights
    correlated: Sequence[tuple[int, float]] = field(default=())  # neuron, Pearson correlation


def token_text(raw: bytes) -> str:
    """A token as a string, as `dashboards.token_bytes` reads it back."""
    return raw.decode("utf-8", "backslashreplace")


def feature_json(page: FeaturePage, *, contexts: int, context_tokens: int, dataset: str) -> dict[str, Any]:
    """One entry of a batch's `features`."""
    act_heights, act_centres = _bars(page.acts)
    logit_heights, logit_centres = _bars(page.logits)
    return {
        "feature_index": page.feature,
        "neuron_alignment_indices": [number for number, _, _ in page.neurons],
        "neuron_alignment_values": [float(weight) for _, weight, _ in page.neurons],
        "neuron_alignment_l1": [float(share) for _, _, share in page.neurons],
        "correlated_neurons_indices": [number for number, _ in page.correlated],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [float(value) for _, value in page.correlated],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": [token_text(token) for token, _ in page.lowers],
        "neg_values": [float(value) for _, value in page.lowers],
        "pos_str": [token_text(token) for token, _ in page.raises],
        "pos_values": [float(value) for _, value in page.raises],
        "frac_nonzero": float(page.density),
        "freq_hist_data_bar_values": act_centres,
        "freq_hist_data_bar_heights": act_heights,
        "logits_hist_data_bar_heights": logit_heights,
        "logits_hist_data_bar_values": logit_centres,
        "n_prompts_total": contexts,
        "n_tokens_in_prompt": context_tokens,
        "dataset": dataset,
        "decoder_weights_dist": [],
        "activations": [_example(example) for example in page.examples],
        "vector": [],
    }


def _bars(histogram: tuple[np.ndarray, np.ndarray] | None) -> tuple[list[float], list[float]]:
    """The heights of a histogram's bars and their centres."""
    if histogram is None or not len(histogram[0]):
        return [], []
    counts, edges = histogram
    return [float(count) for count in counts], [float(centre) for centre in (edges[:-1] + edges[1:]) / 2]


def _example(example: Example) -> dict[str, Any]:
    return {
        "bin_min": float(example.low),
        "bin_max": float(example.high),
        "bin_contains": float(example.share),
        "tokens": [token_text(token) for token in example.tokens],
        "values": [float(value) for value in example.acts],
        "qualifying_token_index": int(example.hit),
    }


def batch_json(features: Sequence[dict[str, Any]], *, model: str, layer: int, name: str) -> dict[str, Any]:
    """One `batch-N.json`."""
    return {"model_id": model, "layer": layer, "sae_set": name, "sae_id_suffix": None, "features": list(features)}


def settings_json(*, model: str, layer: int, name: str, dataset: str, contexts: int, tokens: int) -> dict[str, Any]:
    """`run_settings.json`: what SAEDashboard's runner was told, as far as it applies."""
    return {
        "sae_set": name,
        "sae_path": "",
        "np_set_name": name,
        "np_sae_id_suffix": None,
        "model_id": model,
        "layer": layer,
        "huggingface_dataset_path": dataset,
        "n_prompts_total": contexts,
        "n_tokens_in_prompt": tokens,
    }
