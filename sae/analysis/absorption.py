"""Absorption: a feature for a kind of token does not fire where a feature for one single token fires in its place.

The kinds of token are its first letter and its character class, which even a one-layer model represents.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from sae.analysis.probing import balanced_rows, fit_probe

MIN_TOKENS = 200  # of a kind, in the training and in the test tokens
PROBE_TOKENS = 1000  # of the kind and of the rest
MIN_PROBE_ACCURACY = 0.9
CARRIED = 0.5  # share of the active features' sum along the probe direction
ON_ONE_TOKEN = 0.8  # share of a feature's firings

FORMULA = (
    "over held-out tokens of a kind that a linear probe on x recognises: share on which the kind's own feature "
    "(largest difference of means) is silent while one active feature, "
    f"{ON_ONE_TOKEN:.0%} of whose firings are on one token, carries at least {CARRIED:.0%} of Σ f d·probe; "
    f"mean over kinds whose probe reaches {MIN_PROBE_ACCURACY} balanced accuracy"
)


class Tokens(NamedTuple):
    """Kept tokens, their activations x at the hook point, and their feature activations."""

    ids: Int[np.ndarray, " n"]
    x: Float[np.ndarray, "n d_in"]
    acts: sparse.csr_array


def kinds_of_token(vocabulary: list[bytes]) -> dict[str, Bool[np.ndarray, " d_vocab"]]:
    """Which tokens start with each letter (whatever its case, after a leading space) and which are of each class."""
    words = [token.removeprefix(b" ") for token in vocabulary]
    first = np.array([word[:1].decode("latin-1") for word in words])
    lower = np.char.lower(first)
    kinds = {f"first letter {letter}": lower == letter for letter in string.ascii_lowercase}
    return kinds | {
        "leading space": np.array([token.startswith(b" ") for token in vocabulary]),
        "digit": np.isin(first, list(string.digits)),
        "capital": np.isin(first, list(string.ascii_uppercase)),
        "punctuation": np.isin(first, list(string.punctuation)),
        "white space": np.array([bool(token) and not token.strip() for token in vocabulary]),
        "beyond ASCII": np.array([any(byte > 127 for byte in token) for token in vocabulary]),
    }


def absorption(
    train: Tokens,
    test: Tokens,
    kinds: Mapping[str, Bool[np.ndarray, " d_vocab"]],
    W_dec: Float[np.ndarray, "d_sae d_in"],
    seed: int = 0,
) -> dict[str, Any]:
    """The absorption rate of each kind of token that a linear probe on x recognises, and their mean.

    Source: Chanin et al. 2024 (arXiv 2409.14507), simplified: the absorbing feature is found by its share of the probe
    direction instead of by ablation, and must fire on one token, so that feature splitting does not count.
    """
    rng = np.random.default_rng(seed)
    token_bound = _token_bound(train, len(next(iter(kinds.values()), np.empty(0))))
    found: dict[str, dict[str, float]] = {}
    for name, members in kinds.items():
        rows = balanced_rows(members[train.ids], PROBE_TOKENS, rng)
        positive = np.flatnonzero(members[test.ids])
        if len(rows) < 2 * MIN_TOKENS or len(positive) < MIN_TOKENS:
            continue
        probe = fit_probe(train.x[rows], members[train.ids[rows]])
        test_rows = balanced_rows(members[test.ids], PROBE_TOKENS, rng)
        accuracy = float(probe.score(test.x[test_rows], members[test.ids[test_rows]]))
        if accuracy < MIN_PROBE_ACCURACY:
            continue
        recognised = positive[probe.predict(test.x[positive])]
        main = _main_feature(train.acts[rows], members[train.ids[rows]])
        absorbed = _absorbed(test.acts[recognised], main, W_dec @ probe.coef_[0], token_bound)
        found[name] = {"rate": float(absorbed.mean()) if len(recognised) else 0.0, "probe_accuracy": accuracy}
    rates = [entry["rate"] for entry in found.values()]
    return {"mean": float(np.mean(rates)) if rates else None, "kinds": found, "formula": FORMULA, "version": 1}


def _main_feature(acts: sparse.csr_array, members: Bool[np.ndarray, " n"]) -> int:
    """The feature with the largest difference of means between members and the rest."""
    weights = members / max(1, members.sum()) - ~members / max(1, (~members).sum())
    return int(np.argmax(weights @ acts))


def _token_bound(tokens: Tokens, d_vocab: int) -> Bool[np.ndarray, " d_sae"]:
    """Features with at least ON_ONE_TOKEN of their firings on one token."""
    entries = tokens.acts.tocoo()
    counts = sparse.csr_array(
        (np.ones(entries.nnz), (entries.col, tokens.ids[entries.row])), shape=(tokens.acts.shape[1], d_vocab)
    )
    most, total = (_column(of_features) for of_features in (counts.max(axis=1), counts.sum(axis=1)))
    return np.asarray(most >= ON_ONE_TOKEN * np.maximum(total, 1))


def _absorbed(
    acts: sparse.csr_array, main: int, along: Float[np.ndarray, " d_sae"], token_bound: Bool[np.ndarray, " d_sae"]
) -> Bool[np.ndarray, " n"]:
    """Tokens on which `main` is silent and a token-bound feature carries enough of Σ f · `along` (W_dec · probe)."""
    silent = _column(acts[:, [main]]) == 0
    parts = acts.copy()
    parts.data = acts.data * along[acts.indices]
    total = _column(parts.sum(axis=1))
    parts.data = np.where(token_bound[acts.indices], parts.data, 0.0)
    largest = _column(parts.max(axis=1)) if parts.shape[0] else np.empty(0)
    return np.asarray(silent & (total > 0) & (largest >= CARRIED * total))


def _column(values: Any) -> Float[np.ndarray, " n"]:
    """A vector from what scipy returns for a column or for a reduction of the rows."""
    return np.asarray(values.todense() if sparse.issparse(values) else values).reshape(-1)
