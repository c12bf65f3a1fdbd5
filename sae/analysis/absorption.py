"""Absorption: a feature for a kind of token that falls silent where a feature for one token speaks in its place.

The kinds are what a one-layer model knows of a token: its first letter and its character class.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

MIN_TOKENS = 200  # of a kind, in training and in test
PROBE_TOKENS = 1000  # of each side
MIN_PROBE_ACCURACY = 0.9
CARRIED = 0.5  # of what the active features put along the probe
ON_ONE_TOKEN = 0.8  # of a feature's firings

FORMULA = (
    "over held-out tokens of a kind that a linear probe on x recognises: share on which the kind's own feature "
    "(largest difference of means) is silent while one active feature, "
    f"{ON_ONE_TOKEN:.0%} of whose firings are on one token, carries at least {CARRIED:.0%} of Σ f d·probe; "
    f"mean over kinds whose probe reaches {MIN_PROBE_ACCURACY} balanced accuracy"
)


class Tokens(NamedTuple):
    """Kept tokens with their activations at the hook and the dictionary's."""

    ids: Int[np.ndarray, " n"]
    x: Float[np.ndarray, "n d_in"]
    acts: sparse.csr_array


def kinds_of_token(vocabulary: list[bytes]) -> dict[str, Bool[np.ndarray, " d_vocab"]]:
    """Which tokens begin with each letter (leading space and case apart), and which are of each character class."""
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
    train: Tokens, test: Tokens, kinds: Mapping[str, np.ndarray], W_dec: Float[np.ndarray, "d_sae d_in"], seed: int = 0
) -> dict[str, Any]:
    """The absorption rate of each kind of token that the activations represent, and their mean.

    Source: Chanin et al. 2024 (arXiv 2409.14507), simplified: the direct carrier is found by its share of the probe
    direction instead of by ablation, and must be a feature of one token, so that splitting does not count.
    """
    rng = np.random.default_rng(seed)
    token_bound = _token_bound(train, len(next(iter(kinds.values()), np.empty(0))))
    found: dict[str, dict[str, float]] = {}
    for name, members in kinds.items():
        rows = _balanced(members[train.ids], rng)
        positive = np.flatnonzero(members[test.ids])
        if len(rows) < 2 * MIN_TOKENS or len(positive) < MIN_TOKENS:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe = LogisticRegression(C=1.0).fit(train.x[rows], members[train.ids[rows]])
        judged = _balanced(members[test.ids], rng)
        accuracy = probe.score(test.x[judged], members[test.ids[judged]])
        if accuracy < MIN_PROBE_ACCURACY:
            continue
        seen = positive[probe.predict(test.x[positive])]
        main = _main_feature(train.acts[rows], members[train.ids[rows]])
        absorbed = _absorbed(test.acts[seen], main, W_dec @ probe.coef_[0], token_bound)
        found[name] = {"rate": float(absorbed.mean()) if len(seen) else 0.0, "probe_accuracy": float(accuracy)}
    rates = [entry["rate"] for entry in found.values()]
    return {"mean": float(np.mean(rates)) if rates else None, "kinds": found, "formula": FORMULA, "version": 1}


def _balanced(members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mine, rest = (rng.permutation(np.flatnonzero(which)) for which in (members, ~members))
    n = min(PROBE_TOKENS, len(mine), len(rest))
    return np.concatenate([mine[:n], rest[:n]])


def _main_feature(acts: sparse.csr_array, members: np.ndarray) -> int:
    weights = members / max(1, members.sum()) - ~members / max(1, (~members).sum())
    return int(np.argmax(weights @ acts))


def _token_bound(tokens: Tokens, d_vocab: int) -> Bool[np.ndarray, " d_sae"]:
    """Features most of whose firings are on one token."""
    entries = tokens.acts.tocoo()
    counts = sparse.csr_array(
        (np.ones(entries.nnz), (entries.col, tokens.ids[entries.row])), shape=(tokens.acts.shape[1], d_vocab)
    )
    most = np.asarray(counts.max(axis=1).todense()).reshape(-1)
    return most >= ON_ONE_TOKEN * np.maximum(np.asarray(counts.sum(axis=1)).reshape(-1), 1)


def _absorbed(
    acts: sparse.csr_array, main: int, along: Float[np.ndarray, " d_sae"], token_bound: np.ndarray
) -> Bool[np.ndarray, " n"]:
    silent = np.asarray(acts[:, [main]].todense()).reshape(-1) == 0
    parts = acts.copy()
    parts.data = acts.data * along[acts.indices]
    total = np.asarray(parts.sum(axis=1)).reshape(-1)
    parts.data = np.where(token_bound[acts.indices], parts.data, 0.0)
    largest = np.asarray(parts.max(axis=1).todense()).reshape(-1) if parts.shape[0] else np.empty(0)
    return silent & (total > 0) & (largest >= CARRIED * total)
