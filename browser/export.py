"""Exports features as one self-contained HTML page or as JSON; token text is escaped, and never in an attribute."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from browser import data, dumps, rule_labels
from browser.data import Example
from browser.tokens import Piece, label, visible
from store.features import FeatureIndex
from store.notes import Note

MAX_FEATURES = 200  # per page
BEFORE, AFTER = 22, 12
N_TOP, PER_INTERVAL, N_LIST = 20, 5, 10
STYLE = """
:root { color-scheme: light dark; --back: #fdfdfc; --text: #23272d; --line: #dedcd6; --hot: 232 130 12; }
@media (prefers-color-scheme: dark) { :root { --back: #15181d; --text: #e3e5e8; --line: #343a43; --hot: 190 100 10; } }
body { background: var(--back); color: var(--text); font: 14px/1.5 system-ui, sans-serif; margin: 1.5rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.2rem; } h2 { font-size: 1.1rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 0.9rem; margin: 1rem 0 0.2rem; } h3 small, .source, dt { opacity: 0.65; font-weight: 400; }
dl { display: flex; flex-wrap: wrap; gap: 0.2rem 1.4rem; margin: 0; } dl div { display: flex; gap: 0.4rem; }
dd { margin: 0; } .ex { font: 12.5px/1.7 ui-monospace, monospace; border-bottom: 1px solid var(--line);
  white-space: break-spaces; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.ex b { font: 11px system-ui; opacity: 0.65; display: inline-block; min-width: 3.6em; }
.t { border-radius: 2px; background: rgb(var(--hot) / var(--p, 0)); } .x { opacity: 0.55; }
"""


ALL_FIRINGS_NEEDED = ("count", "mean", "mean_sq", "p99", "domain_top", "domain_purity", "top_token_share")


def describe(index: FeatureIndex, feature: int, note: Note) -> dict[str, Any]:
    """What the feature's page shows, as plain values; an example has token ids, their text and the activations."""
    rows, values = index.firings(feature)
    stats = {name: column[feature].item() for name, column in index.stats.items()}
    stats["density"] = float(data.density(index)[feature])
    if index.sampled:
        stats = {name: value for name, value in stats.items() if name not in ALL_FIRINGS_NEEDED}
    found: dict[str, Any] = {
        "feature": feature,
        "label": note.label,
        "note": note.note,
        "sampled": index.sampled,
        "statistics": {name: value for name, value in stats.items() if value == value},
        "fires_on": [_share(index, each) for each in data.token_shares(index, rows, values, N_LIST)],
    }
    automatic = rule_labels.auto_label(index, feature)
    if automatic is not None:
        found["automatic_label"] = vars(automatic)
    for side, name in (("top", "raises"), ("bottom", "lowers")):
        if index.has(f"logits/{side}_id"):
            found[name] = [
                {"token_id": i, "token": label(index.token_bytes(i)), "logit_weight": weight}
                for i, weight in data.logit_weights(index, side, feature, N_LIST)
            ]
    found |= _related(index, feature)
    found["histograms"] = {
        name: {column: frame[column].tolist() for column in frame}
        for name, frame in _histograms(index, feature, values).items()
        if len(frame)
    }
    found["examples"] = [
        {"title": title, "note": said, "texts": [_text(example) for example in shown]}
        for title, said, shown in _examples(index, feature, rows, values)
    ]
    return found


def _related(index: FeatureIndex, feature: int) -> dict[str, Any]:
    """Other features and neurons, each with its score, as in the lists of the page."""
    found: dict[str, Any] = {}
    for name, score in data.RELATED.items():
        if index.has(f"{name}/id"):
            found[name] = _scored(index, feature, "feature", f"{name}/id", {score: f"{name}/{score}"})
    if index.has("neurons/weight_id"):
        columns = {"weight": "neurons/weight_value", "share": "neurons/weight_share"}
        found["aligned_neurons"] = _scored(index, feature, "neuron", "neurons/weight_id", columns)
    if index.has("neurons/corr_id"):
        found["correlated_neurons"] = _scored(
            index, feature, "neuron", "neurons/corr_id", {"pearson": "neurons/corr_value"}
        )
    return found


def _scored(
    index: FeatureIndex, feature: int, what: str, numbers: str, columns: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows of a list: the number of a feature or neuron, and its scores; unknown scores are None."""
    scores = {name: index.panel(panel, feature).tolist() for name, panel in columns.items() if index.has(panel)}
    return [
        {what: number} | {name: value[i] if np.isfinite(value[i]) else None for name, value in scores.items()}
        for i, number in enumerate(index.panel(numbers, feature).tolist())
        if number >= 0
    ]


def _histograms(index: FeatureIndex, feature: int, values: np.ndarray) -> dict[str, pd.DataFrame]:
    if index.sampled:
        return {
            name: dumps.histogram(index, kind, feature)
            for name, kind in (("activations", "act"), ("logit_weights", "logit"))
        }
    return {"activations": data.activation_histogram(values), "logit_weights": data.logit_histogram(index, feature)}


def _share(index: FeatureIndex, each: data.TokenShare) -> dict[str, Any]:
    """How often a feature fires on a token; a sampled index has no recall."""
    token = {"token_id": each.token_id, "token": label(index.token_bytes(each.token_id))}
    scores = {"precision": float(each.share), "mean": each.mean}
    return token | scores | ({} if index.sampled else {"recall": float(each.recall)})


def _examples(
    index: FeatureIndex, feature: int, rows: np.ndarray, values: np.ndarray
) -> Iterator[tuple[str, str, list[Example]]]:
    """Title, note and texts of each group."""
    if index.sampled:
        for title, n, shown in dumps.groups(index, feature, before=BEFORE, after=AFTER):
            yield title, f"{n:,} samples", shown
        return
    if not len(rows):
        return

    def around(wanted: np.ndarray) -> list[Example]:
        return data.examples(index, rows, values, wanted, before=BEFORE, after=AFTER)

    yield "Top activations", f"max {values.max():.3f}", around(data.top_rows(rows, values, N_TOP, index.seq_len))
    for each in data.intervals(rows, values, per_interval=PER_INTERVAL, seed=0):
        title, said = f"({each.low:.3g}, {each.high:.3g}]", f"{each.count:,} firings, {each.share:.2%} of all"
        yield title, said, around(each.rows)


def _text(example: Example) -> dict[str, Any]:
    return {
        "document": example.document.id,
        "domain": example.document.domain,
        "context": example.context,
        "start": example.start,
        "token_ids": example.token_ids.tolist(),
        "tokens": [_joined(shown) for shown in example.shown],
        "activations": [round(float(act), 5) for act in example.acts],
    }


def _joined(shown: Sequence[Piece]) -> str:
    """A token as text; bytes of an incomplete character appear as ‹hex›."""
    return "".join(f"‹{text}›" if kind == "hex" else text for kind, text in shown)


def to_json(provenance: str, features: Sequence[dict[str, Any]]) -> bytes:
    """The features as UTF-8 JSON."""
    content = {"format": 1, "kind": "features", "provenance": provenance, "features": list(features)}
    return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False).encode()


def to_html(provenance: str, features: Sequence[dict[str, Any]]) -> bytes:
    """The features as one HTML page for light and dark, without scripts and links."""
    body = "".join(_feature(feature) for feature in features)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>monosem features</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head><body>'
        f'<h1>Features of a dictionary</h1><p class="source">{html.escape(provenance)}</p>{body}</body></html>'
    ).encode()


def _feature(feature: dict[str, Any]) -> str:
    said = feature["label"] or (feature.get("automatic_label") or {}).get("text", "")
    stats = feature["statistics"]
    facts = {name: stats[name] for name in ("density", "count", "max", "p99", "mean", "delta_loss") if name in stats}
    lines = [
        f"<h2>Feature {feature['feature']} <bdi>{html.escape(said)}</bdi></h2>",
        _facts([(name, f"{value:.4g}") for name, value in facts.items()]),
    ]
    if feature["note"]:
        lines.append(f"<p>{html.escape(feature['note'])}</p>")
    for name, value in (("raises", "logit_weight"), ("lowers", "logit_weight"), ("fires_on", "precision")):
        if feature.get(name):
            shown = [(each["token"], f"{each[value]:.3g}") for each in feature[name]]
            lines.append(f"<h3>{name.replace('_', ' ')} <small>{value.replace('_', ' ')}</small></h3>{_facts(shown)}")
    most = max(stats.get("max") or 0.0, 1e-12)
    for group in feature["examples"]:
        lines.append(f"<h3>{html.escape(group['title'])} <small>{html.escape(group['note'])}</small></h3>")
        for text in group["texts"]:
            tokens = "".join(_token(t, act / most) for t, act in zip(text["tokens"], text["activations"], strict=True))
            lines.append(f'<div class="ex" dir="auto"><b>{max(text["activations"]):.3g}</b>{tokens}</div>')
    return "".join(lines)


def _token(text: str, share: float) -> str:
    shown = html.escape(" ".join(map(visible, text.split(" "))), quote=True)
    if share <= 0:
        return f"<span>{shown}</span>"
    return f'<span class="t" style="--p:{0.12 + 0.8 * min(1.0, share):.2f}">{shown}</span>'


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    cells = (
        f"<div><dt><bdi>{html.escape(name)}</bdi></dt><dd>{html.escape(value)}</dd></div>" for name, value in facts
    )
    return f"<dl>{''.join(cells)}</dl>"
