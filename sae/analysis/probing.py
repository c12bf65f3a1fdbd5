"""k-sparse probing: how well the k features that best tell a label apart, and no others, predict it."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

KS = (1, 2, 5)
MIN_TOKENS = 200  # of a class, in training and in test
TRAIN_TOKENS, TEST_TOKENS = 2000, 1000  # of each side at most


class Labelled(NamedTuple):
    """Activations [tokens, features] and the class of each token (-1: of none that is asked about)."""

    acts: sparse.csr_array
    labels: Int[np.ndarray, " tokens"]


def probe(train: Labelled, test: Labelled, classes: list[str], *, seed: int = 0) -> dict[str, Any]:
    """Accuracy on single tokens, each class against the rest in equal numbers (chance 0.5), for k = 1, 2, 5.

    The k features with the largest |mean on the class − mean on the rest| over training tokens, scaled by their
    standard deviation, in a logistic regression (C = 1); accuracy on test tokens. Classes with fewer than MIN_TOKENS
    in either are left out.
    Source: Gurnee et al. 2023 (arXiv 2305.01610); SAEBench (arXiv 2503.09532), sparse probing.
    """
    rng = np.random.default_rng(seed)
    by_class: dict[str, dict[str, float]] = {}
    for number, name in enumerate(classes):
        chosen = [
            _balanced(part.labels, number, limit, rng) for part, limit in ((train, TRAIN_TOKENS), (test, TEST_TOKENS))
        ]
        if min(len(rows) for rows in chosen) < 2 * MIN_TOKENS:
            continue
        (x, y), (x_test, y_test) = (
            (part.acts[rows].tocsc(), part.labels[rows] == number)
            for part, rows in zip((train, test), chosen, strict=True)
        )
        difference = np.abs(_mean(x, y) - _mean(x, ~y))
        order = np.argsort(-difference, kind="stable")
        by_class[name] = {f"k{k}": _accuracy(x, y, x_test, y_test, order[:k]) for k in KS}
    return {
        "mean": {
            f"k{k}": float(np.mean([entry[f"k{k}"] for entry in by_class.values()])) if by_class else None for k in KS
        },
        "classes": by_class,
        "formula": "held-out accuracy of a logistic regression on the k features with the largest difference of means, "
        "one class against the rest in equal numbers (chance 0.5), mean over classes",
        "version": 1,
    }


def _balanced(labels: np.ndarray, number: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of the class and as many of the rest, at most `limit` of each."""
    mine, rest = (rng.permutation(np.flatnonzero(which)) for which in (labels == number, labels != number))
    n = min(limit, len(mine), len(rest))
    return np.concatenate([mine[:n], rest[:n]])


def _mean(x: sparse.csc_array, chosen: np.ndarray) -> np.ndarray:
    return np.asarray(chosen.astype(np.float64) @ x).reshape(-1) / max(1, chosen.sum())


def _accuracy(x: sparse.csc_array, y: np.ndarray, x_test: sparse.csc_array, y_test: np.ndarray, features: Any) -> float:
    dense, dense_test = x[:, features].toarray().astype(np.float64), x_test[:, features].toarray().astype(np.float64)
    scale = dense.std(0)
    scale[scale == 0] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=1.0).fit(dense / scale, y)
    return float(fitted.score(dense_test / scale, y_test))
