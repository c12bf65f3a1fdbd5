"""Made-up feature pages in other tools' formats, with texts of known activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = [
    ["The", " cat", " sat", "\n"],
    ["<script>window.__x=1</script>", " cat", "$x^2$"],
    ["na", "\\xc3", "\\xaf", "ve", " cat"],
]


def acts_of(feature: int, text: int) -> list[float]:
    """Positive on " cat" only, and differently in each text."""
    return [round((feature + 1) * (text + 1) / 4, 4) if token == " cat" else 0.0 for token in TEXTS[text]]


def dashboard_feature(feature: int) -> dict[str, Any]:
    return {
        "feature_index": feature,
        "neuron_alignment_indices": [7, 3],
        "neuron_alignment_values": [0.5, -0.25],
        "pos_str": [" dog", "\n"],
        "pos_values": [1.5, 1.25],
        "neg_str": ["zzz"],
        "neg_values": [-2.0],
        "frac_nonzero": 0.01 * (feature + 1),
        "freq_hist_data_bar_values": [0.5, 1.5],
        "freq_hist_data_bar_heights": [30, 10],
        "logits_hist_data_bar_values": [-1.0, 0.0, 1.0],
        "logits_hist_data_bar_heights": [5, 90, 5],
        "activations": [
            {
                "bin_min": low,
                "bin_max": low + 1,
                "bin_contains": 0.125,
                "tokens": TEXTS[i],
                "values": acts_of(feature, i),
                "qualifying_token_index": TEXTS[i].index(" cat"),
            }
            for i, low in enumerate((-1, 0, 0))
        ],
    }


def dashboard(folder: Path) -> Path:
    """Two batches: features 0 and 1, then 3."""
    folder.mkdir(parents=True)
    for number, features in enumerate(([0, 1], [3])):
        batch = {"model_id": "made-up", "layer": 2, "sae_set": "res", "features": [*map(dashboard_feature, features)]}
        (folder / f"batch-{number}.json").write_text(json.dumps(batch))
    return folder


def paper_feature(feature: int) -> dict[str, Any]:
    texts = [
        {
            "tokens_str_list": tokens,
            "tokens_acts_list": acts_of(feature, i),
            "train_token_ind": tokens.index(" cat"),
            "is_repeated_datapoint": False,
            "datapoint_ind": 100 + i,
            "ablations": {"loss_ablation": [0.25 if act else 0.0 for act in acts_of(feature, i)]},
        }
        for i, tokens in enumerate(TEXTS)
    ]
    return {
        "index": feature,
        "act_buckets": [8, 2],
        "act_bucket_edges": [0.0, 1.0, 2.0],
        "logit_buckets": [4, 4],
        "logit_bucket_edges": [-1.0, 0.0, 1.0],
        "examples_quantiles": [
            {"quantile_name": "Top", "quantile_max_act": 2.0, "examples": texts[1:]},
            {"quantile_name": "Subsample <interval> 1", "quantile_max_act": 0.5, "examples": texts[:1]},
        ],
        "statistics": {
            "density_frac": 0.002,
            "global_max_act": 9.5,
            "abs_max_neuron_weights": [0.5],
            "abs_max_neuron_inds": [12],
            "l1_max_neuron_weights": [0.1],
        },
        "logit_effects": {"positives": [[" dog", 1.5]], "negatives": [["zzz", -2.0]]},
    }


def paper(folder: Path, features: tuple[int, ...] = (0, 1, 10)) -> Path:
    """One file per feature."""
    folder.mkdir(parents=True)
    for feature in features:
        (folder / f"{feature}.json").write_text(json.dumps(paper_feature(feature)))
    return folder


def dense(feature: int, order: list[int]) -> list[np.ndarray]:
    """The activations of the feature's texts in `order`, as float16 stores them."""
    return [np.array(acts_of(feature, i), np.float32).astype(np.float16).astype(np.float32) for i in order]
