"""Labels by rule: short rules, found without a language model, that say where a feature fires."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from browser.tokens import label
from store.features import FeatureIndex

LABEL_KINDS = ("token", "after", "pair", "domain")


@dataclass(frozen=True)
class AutoLabel:
    """A rule that says where a feature fires, found without a language model, and its scores on held-out contexts."""

    text: str
    kind: str
    precision: float
    recall: float
    f1: float


def auto_label(index: FeatureIndex, feature: int) -> AutoLabel | None:
    """The label by rule of a feature; None if no rule was found."""
    if not index.has("label/kind"):
        return None
    kind = int(index.panel("label/kind", feature))
    if kind < 0:
        return None
    keys = index.panel("label/keys", feature)
    precision, recall, f1 = index.panel("label/score", feature).tolist()
    return AutoLabel(rule_text(index, LABEL_KINDS[kind], keys), LABEL_KINDS[kind], precision, recall, f1)


def rule_text(index: FeatureIndex, kind: str, keys: np.ndarray) -> str:
    """A rule in words, e.g. "after ␣the"; `keys` are pairs of ids, (-1, -1) where unused."""

    def token(number: int) -> str:
        return label(index.token_bytes(number))

    used = [(int(a), int(b)) for a, b in keys if (a, b) != (-1, -1)]
    if kind == "domain":
        return "in " + ", ".join(index.domains[a] for a, _ in used)
    if kind == "after":
        return "after " + "  ".join(token(a) for a, _ in used)
    if kind == "pair":
        return "  ".join(token(a) + token(b) for a, b in used)
    return "  ".join(token(b) for _, b in used)
