"""k-sparse probing: how well the k features that differ most between a class and the rest predict the class."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

KS = (1, 2, 5)
MIN_TOKENS = 200  # of a class, in training and in test
TRAIN_TOKENS, TEST_TOKENS = 2000, 1000  # of each side at most


class Labelled(NamedTuple):
    """Activations [tokens, features] and the class of each token (-1: none of the classes)."""

    acts: sparse.csr_array
    labels: Int[np.ndarray, " tokens"]


def probe(train: Labelled, test: Labelled, classes: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Accuracy on single tokens of k-sparse probes, k = 1, 2, 5: each class against as many other tokens (chance 0.5).

    A probe is a logistic regression (C = 1) on the k features with the largest |mean on the class − mean on the rest|
    over training tokens, each divided by its standard deviation. Its accuracy is measured on test tokens. Classes with
    fewer than MIN_TOKENS tokens in either are left out.
    Source: Gurnee et al. 2023 (arXiv 2305.01610); SAEBench (arXiv 2503.09532), sparse probing.
    """
    rng = np.random.default_rng(seed)
    by_class: dict[str, dict[str, float]] = {}
    for number, name in enumerate(classes):
        rows = balanced_rows(train.labels == number, TRAIN_TOKENS, rng)
        test_rows = balanced_rows(test.labels == number, TEST_TOKENS, rng)
        if min(len(rows), len(test_rows)) < 2 * MIN_TOKENS:
            continue
        x, y = train.acts[rows].tocsc(), train.labels[rows] == number
        x_test, y_test = test.acts[test_rows].tocsc(), test.labels[test_rows] == number
        difference = np.abs(_mean(x, y) - _mean(x, ~y))
        order = np.argsort(-difference, kind="stable")
        by_class[name] = {f"k{k}": _accuracy(x, y, x_test, y_test, order[:k]) for k in KS}
    return {
        "mean": {f"k{k}": _mean_over_classes(by_class, f"k{k}") for k in KS},
        "classes": by_class,
        "formula": "held-out accuracy of a logistic regression on the k features with the largest difference of means, "
        "one class against the rest in equal numbers (chance 0.5), mean over classes",
        "version": 1,
    }


def balanced_rows(
    members: Bool[np.ndarray, " tokens"], most: int, rng: np.random.Generator
) -> Int[np.ndarray, " chosen"]:
    """As many members as others, drawn at random: at most `most` of each, the members first."""
    inside, outside = (rng.permutation(np.flatnonzero(which)) for which in (members, ~members))
    n = min(most, len(inside), len(outside))
    return np.concatenate([inside[:n], outside[:n]])


def fit_probe(x: Float[np.ndarray, "tokens d"], y: Bool[np.ndarray, " tokens"]) -> LogisticRegression:
    """A logistic regression (C = 1); a fit that stops at scikit-learn's limit of iterations is good enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1.0).fit(x, y)


def _mean(x: sparse.csc_array, chosen: Bool[np.ndarray, " tokens"]) -> Float[np.ndarray, " features"]:
    """The mean of each column over the chosen rows."""
    return np.asarray(np.asarray(chosen.astype(np.float64) @ x).reshape(-1) / max(1, chosen.sum()))


def _accuracy(
    x: sparse.csc_array,
    y: Bool[np.ndarray, " tokens"],
    x_test: sparse.csc_array,
    y_test: Bool[np.ndarray, " test_tokens"],
    features: Int[np.ndarray, " k"],
) -> float:
    """Test accuracy of a probe on these features."""
    train, test = (matrix[:, features].toarray().astype(np.float64) for matrix in (x, x_test))
    scale = train.std(0)
    scale[scale == 0] = 1.0
    return float(fit_probe(train / scale, y).score(test / scale, y_test))


def _mean_over_classes(by_class: Mapping[str, Mapping[str, float]], k: str) -> float | None:
    return float(np.mean([entry[k] for entry in by_class.values()])) if by_class else None
