"""Reads an index that was imported from another tool's feature pages. It holds samples, so they are never counted.

Each text of a feature is a context; the name of its document is the group that it was sampled for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from browser.data import Example, examples
from browser.live.ablation import Effect, Effects
from store.features import FeatureIndex

MAX_TEXTS = 30  # shown per group


def histogram(index: FeatureIndex, kind: str, feature: int) -> pd.DataFrame:
    """The dump's own histogram of "act" (activations) or "logit" (weights): low, high, count; empty if missing."""
    if not index.has(f"dump/{kind}_counts"):
        return pd.DataFrame({"low": [], "high": [], "count": []})
    counts, edges = index.panel(f"dump/{kind}_counts", feature), index.panel(f"dump/{kind}_edges", feature)
    known = np.isfinite(counts)
    edges = edges[: int(known.sum()) + 1].astype(float)
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": counts[known]})


def groups(index: FeatureIndex, feature: int, *, before: int, after: int) -> list[tuple[str, int, list[Example]]]:
    """Title, number of texts, and texts of each group, in the order of the dump."""
    rows, values = index.firings(feature)
    first, count = index.panel("dump/contexts", feature).tolist()
    found: dict[str, list[int]] = {}
    for context in range(first, first + count):
        hit = int(index.panel("dump/hit", context))
        row = context * index.seq_len + hit
        found.setdefault(index.document_of(row).id, []).append(row)
    return [
        (title, len(own), [_unpadded(index, example) for example in shown])
        for title, own in found.items()
        for shown in [examples(index, rows, values, np.array(own[:MAX_TEXTS]), before=before, after=after)]
    ]


def _unpadded(index: FeatureIndex, example: Example) -> Example:
    """The example without padding; contexts are padded to the longest text of the dump."""
    n = int(index.keep_at(example.context).sum()) - example.start
    return replace(example, token_ids=example.token_ids[:n], shown=example.shown[:n], acts=example.acts[:n])


def effects(index: FeatureIndex, shown: Sequence[Example]) -> Effects:
    """The ablation losses in the dump for the tokens of `shown`; only the change of the loss is known."""
    found = Effects()
    for example in shown:
        losses = index.panel("dump/loss", example.context)
        for i in range(len(example.token_ids)):
            change = float(losses[example.start + i])
            if np.isfinite(change) and change:
                found.at[example.context, example.start + i] = Effect(None, change, [], [])
    return found
