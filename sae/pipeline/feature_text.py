"""One feature of an index as plain values, for a terminal or a script."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from sae.pipeline.resolve import PipelineError
from store.features import FeatureIndex

BEFORE, AFTER = 12, 6  # tokens around a firing
N_EXAMPLES, N_TOKENS = 12, 8


def describe_feature(path: str | Path, feature: int) -> dict[str, Any]:
    """What a feature fires on, raises and lowers: of the dictionary (or its features.zarr) at `path`.

    `examples` are the strongest firings, one for each context: activation, domain, text before, token, text after.
    Text is made visible: a control character or part of a character stands as an escape.
    Raises: StoreError without an index; PipelineError for a feature that does not exist.
    """
    path = Path(path)
    index = FeatureIndex.open(path if path.name.endswith(".zarr") else path / "features.zarr")
    if not 0 <= feature < index.d_sae:
        raise PipelineError(f"{path}: feature {feature} does not exist; features are 0 … {index.d_sae - 1:,}.")
    rows, values = index.firings(feature)
    density = index.stats["density"][feature] if index.sampled else len(rows) / max(1, index.kept_tokens)
    ids, counts = np.unique(index.tokens_of(rows), return_counts=True)
    usual = np.lexsort((ids, -counts))[:N_TOKENS]
    found: dict[str, Any] = {
        "feature": feature,
        "density": float(density),
        "firings in the samples" if index.sampled else "firings": len(rows),
        "max": float(values.max()) if len(rows) else 0.0,
        "fires_on": {visible(index.token_bytes(int(ids[i]))): float(counts[i] / len(rows)) for i in usual},
    }
    for side, name in (("top", "raises"), ("bottom", "lowers")):
        if index.has(f"logits/{side}_id"):
            tokens, weights = (index.panel(f"logits/{side}_{part}", feature)[:N_TOKENS] for part in ("id", "value"))
            pairs = zip(tokens.tolist(), weights.tolist(), strict=True)
            found[name] = {visible(index.token_bytes(i)): weight for i, weight in pairs if i >= 0}
    order = np.argsort(-values, kind="stable")
    _, first = np.unique(rows[order] // index.seq_len, return_index=True)
    strongest = order[np.sort(first)[:N_EXAMPLES]]
    found["examples"] = [_example(index, int(rows[i]), float(values[i])) for i in strongest]
    return found


def _example(index: FeatureIndex, row: int, value: float) -> dict[str, Any]:
    window = index.window(row, BEFORE, AFTER)
    hit = window.position - window.start
    tokens = [index.token_bytes(int(token)) for token in window.token_ids]
    parts = (tokens[:hit], tokens[hit : hit + 1], tokens[hit + 1 :])
    before, token, after = (visible(b"".join(part)) for part in parts)
    return {"activation": value, "domain": index.document_of(row)[2], "before": before, "token": token, "after": after}


def visible(raw: bytes) -> str:
    r"""Bytes as text that a terminal shows and does not obey: `\n`, `\x1b`, `\u202e` and broken UTF-8 as escapes."""
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(
        each.encode("unicode_escape").decode() if unicodedata.category(each)[0] in "CZ" and each != " " else each
        for each in text
    )


def feature_text(found: dict[str, Any]) -> str:
    """The description as lines, the firing token in brackets."""
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float) and name != "feature"}
    lines = [f"feature {found['feature']}", "  ".join(f"{name} {value:,.4g}" for name, value in numbers.items())]
    for name in ("fires_on", "raises", "lowers"):
        shown = "  ".join(f"{token!r} {value:.3g}" for token, value in found.get(name, {}).items())
        lines.append(f"{name.replace('_', ' '):9} {shown or 'nothing'}")
    for each in found["examples"]:
        where = f"{each['activation']:8.3f}  {each['domain'][:12]:12}"
        lines.append(f"{where}  {each['before']}[{each['token']}]{each['after']}")
    return "\n".join(lines)
