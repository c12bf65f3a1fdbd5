"""Which features stand for a domain of the text: the best feature's F1, and features that fire in one domain alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

MIN_TOKENS = 200  # of a domain, in either half
MIN_FIRINGS = 10
PURE = 0.8


def f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """The harmonic mean of the two."""
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def scores(fired: Int[np.ndarray, "features domains"], tokens: Int[np.ndarray, " domains"]) -> tuple[np.ndarray, ...]:
    """Precision and recall of "the feature fires" as a test for each domain."""
    return fired / np.maximum(fired.sum(1, keepdims=True), 1), fired / np.maximum(tokens, 1)


def best_features(
    fired: Int[np.ndarray, "features domains halves"], tokens: Int[np.ndarray, "domains halves"]
) -> list[dict[str, Any] | None]:
    """For each domain the feature with the best F1, chosen on one half of the documents and judged on the other.

    Both ways round; precision and recall are over both halves together, each judged by the feature the other chose.
    None where a half has fewer than MIN_TOKENS of the domain.
    """
    chosen = [f1(*scores(fired[..., half], tokens[:, half])).argmax(0) for half in (0, 1)]
    found: list[dict[str, Any] | None] = []
    for domain in range(len(tokens)):
        if tokens[domain].min() < MIN_TOKENS:
            found.append(None)
            continue
        judged = [fired[chosen[1 - half][domain], :, half] for half in (0, 1)]
        hits, firings = sum(int(j[domain]) for j in judged), sum(int(j.sum()) for j in judged)
        precision, recall = hits / max(1, firings), hits / int(tokens[domain].sum())
        found.append(
            {
                "features": [int(choice[domain]) for choice in chosen],
                "precision": precision,
                "recall": recall,
                "f1": float(f1(np.array(precision), np.array(recall))),
            }
        )
    return found


def domain_quality(
    fired: Int[np.ndarray, "features domains halves"], tokens: Int[np.ndarray, "domains halves"], domains: list[str]
) -> dict[str, Any]:
    """The domain table of an evaluation: best features, their mean F1, and how many features are pure."""
    table = dict(zip(domains, best_features(fired, tokens), strict=True))
    by_domain = fired.sum(2)
    firings = by_domain.sum(1)
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
        "formula": f"F1 of 'the feature fires' for 'the token is of the domain', the feature chosen on one half of the "
        f"documents and judged on the other, both ways; domains with {MIN_TOKENS} tokens in each half. Pure: fired on "
        f"{MIN_FIRINGS} tokens or more, over {PURE:.0%} of them in one domain",
        "version": 1,
    }
