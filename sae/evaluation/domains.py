"""Which features stand for a domain of the text: the best feature's F1, and features that fire in one domain alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

MIN_TOKENS = 200  # of a domain, in the choosing and in the judging text
MIN_FIRINGS = 10
PURE = 0.8


def f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """The harmonic mean of the two."""
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def scores(fired: Int[np.ndarray, "features domains"], tokens: Int[np.ndarray, " domains"]) -> tuple[np.ndarray, ...]:
    """Precision and recall of "the feature fires" as a test for each domain."""
    return fired / np.maximum(fired.sum(1, keepdims=True), 1), fired / np.maximum(tokens, 1)


Counts = tuple[Int[np.ndarray, "features domains"], Int[np.ndarray, " domains"]]


def best_features(chosen_on: Counts, judged_on: Counts, n_domains: int) -> list[dict[str, Any] | None]:
    """For each domain the feature with the best F1 on one text, judged on another: firings and tokens by domain.

    Columns beyond `n_domains` are other text, which counts against precision. None where either has fewer than
    MIN_TOKENS of the domain.
    """
    chosen = f1(*scores(*chosen_on)).argmax(0)
    precision, recall = scores(*judged_on)
    found: list[dict[str, Any] | None] = []
    for domain, feature in enumerate(chosen[:n_domains].tolist()):
        if min(chosen_on[1][domain], judged_on[1][domain]) < MIN_TOKENS:
            found.append(None)
            continue
        here = precision[feature, domain], recall[feature, domain]
        found.append(
            {"feature": feature, "precision": float(here[0]), "recall": float(here[1]), "f1": float(f1(*here))}
        )
    return found


def domain_quality(chosen_on: Counts, judged_on: Counts, domains: list[str]) -> dict[str, Any]:
    """The domain table of an evaluation: best features, their mean F1, and how many features are pure."""
    table = dict(zip(domains, best_features(chosen_on, judged_on, len(domains)), strict=True))
    fired = judged_on[0]
    firings = fired.sum(1)
    by_domain = fired[:, : len(domains)]
    share = by_domain.max(1, initial=0) / np.maximum(firings, 1)
    pure = (firings >= MIN_FIRINGS) & (share > PURE)
    known = [entry["f1"] for entry in table.values() if entry]
    return {
        "best_feature": table,
        "mean_f1": float(np.mean(known)) if known else None,
        "pure_features": int(pure.sum()),
        "pure_by_domain": dict(
            zip(domains, np.bincount(by_domain[pure].argmax(1), minlength=len(domains)).tolist(), strict=True)
        )
        if len(domains)
        else {},
        "formula": "F1 of 'the feature fires' for 'the token is of the domain', on held-out tokens, the feature chosen "
        f"on {int(chosen_on[1].sum()):,} training tokens; domains with {MIN_TOKENS} tokens in each. Pure: fired on "
        f"{MIN_FIRINGS} held-out tokens or more, over {PURE:.0%} of them in one domain",
        "version": 1,
    }
