"""What the pages show, read from the runs directory and from one feature index; no Streamlit here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from browser.pictures import Picture, picture_of
from browser.tokens import Piece, pieces
from store.common import DocumentRecord, can_run
from store.features import FeatureIndex

DUMP = "feature-dump"  # kind of a dictionary imported from feature pages: an index of samples, no weights
LEVELS = 4  # directories below the root that are searched for SAEs
ULTRA_LOW = 1e-5  # density (firings per kept token), as in eval.json's ultra_low_share
DENSE = 0.1  # density
N_INTERVALS = 11
# panel of related features → column of its score
RELATED = {"successors": "share", "neighbours": "cosine", "correlated": "pearson", "together": "jaccard"}


@dataclass(frozen=True)
class SaeEntry:
    """An SAE directory found below the root, trained or in training; `id` is its path under the root."""

    id: str
    path: Path
    config: dict[str, Any]

    @property
    def index_path(self) -> Path:
        return self.path / "features.zarr"

    @property
    def has_index(self) -> bool:
        return self.index_path.is_dir()

    @property
    def is_dump(self) -> bool:
        """Whether it was imported from another tool's feature pages: samples, without weights."""
        return self.config.get("kind") == DUMP

    @property
    def has_model(self) -> bool:
        """Whether its model can be run: not if its activations came as arrays."""
        model = self.config.get("model")
        return can_run(model if isinstance(model, dict) else {})

    @property
    def is_crosscoder(self) -> bool:
        """Whether its rows join several hook points or models, so that it has no feature pages."""
        return "sites" in self.config

    @property
    def unfinished(self) -> bool:
        """Whether training has started and not finished."""
        return bool(self.config.get("unfinished"))

    @property
    def d_sae(self) -> int:
        found = self.config.get("d_sae")
        return found if isinstance(found, int) and found > 0 else 1


@dataclass(frozen=True)
class Example:
    """The tokens around `row`, which is token number `hit`; `acts[i]` is the feature's activation on `token_ids[i]`."""

    row: int
    value: float
    context: int
    start: int
    hit: int
    token_ids: np.ndarray
    shown: list[list[Piece]]
    acts: np.ndarray
    document: DocumentRecord
    row_name: str = ""  # of rows that came as arrays: their place there
    picture: Picture | None = None


@dataclass(frozen=True)
class Interval:
    """Firings with activations in (low, high]: their number, their share of all firings, and a sample of their rows."""

    low: float
    high: float
    count: int
    share: float
    rows: np.ndarray


def scan(root: Path) -> list[SaeEntry]:
    """SAE directories up to four levels below `root`, sorted by id; symbolic links are not followed."""
    return sorted(_scan(root, root, LEVELS), key=lambda entry: entry.id)


def _scan(root: Path, folder: Path, levels: int) -> Iterator[SaeEntry]:
    config = read_config(folder / "config.json") or _unfinished_config(folder)
    if config.get("kind") in ("sae", DUMP):
        yield SaeEntry(folder.relative_to(root).as_posix(), folder, config)
    if not levels:
        return
    try:
        with os.scandir(folder) as found:
            children = [entry for entry in found if _worth_entering(entry)]
    except OSError:  # e.g. no permission
        return
    for entry in children:
        yield from _scan(root, Path(entry.path), levels - 1)


def _unfinished_config(folder: Path) -> dict[str, Any]:
    """The configuration of an unfinished dictionary, from its train.json; {} without that file."""
    claim = read_config(folder / "train.json")
    train, rows = claim.get("train"), claim.get("rows")
    if not isinstance(train, dict):
        return {}
    provenance = rows if isinstance(rows, dict) else {}
    shape = {"d_sae": train.get("d_sae"), "recipe": train.get("recipe")}
    return {**provenance, **shape, "train": train, "kind": "sae", "unfinished": True}


def _worth_entering(entry: os.DirEntry[str]) -> bool:
    hidden = entry.name.startswith(".") or ".zarr" in entry.name
    return not hidden and entry.is_dir(follow_symlinks=False)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} if it is missing, damaged, a link or anything else."""
    if path.is_symlink():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def top_rows(rows: np.ndarray, values: np.ndarray, n: int, seq_len: int, *, one_per_context: bool = True) -> np.ndarray:
    """Rows of the `n` largest values, largest first (ties: lower row); of each context only the largest, or all."""
    order = np.lexsort((rows, -values))
    if not one_per_context:
        return rows[order[:n]]
    _, first = np.unique(rows[order] // seq_len, return_index=True)
    return rows[order[np.sort(first)[:n]]]


def bottom_rows(
    rows: np.ndarray, values: np.ndarray, n: int, seq_len: int, *, one_per_context: bool = True
) -> np.ndarray:
    """Rows of the `n` smallest values, smallest first (ties: lower row); of each context only the smallest, or all."""
    return top_rows(rows, -values, n, seq_len, one_per_context=one_per_context)


def control_rows(index: FeatureIndex, rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Up to `n` rows, drawn uniformly from the kept rows on which the feature does not fire, ascending."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(index.n_contexts * index.seq_len, min(8 * n, index.n_contexts * index.seq_len), replace=False)
    kept = [row for row in _silent(drawn, rows).tolist() if index.keep_at(row // index.seq_len)[row % index.seq_len]]
    return np.sort(np.array(kept[:n], np.int64))


def _silent(candidates: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The candidates that are not in `rows` (ascending)."""
    if not len(rows):
        return candidates
    place = np.minimum(np.searchsorted(rows, candidates), len(rows) - 1)
    absent: np.ndarray = candidates[rows[place] != candidates]
    return absent


def same_token_rows(index: FeatureIndex, rows: np.ndarray, n: int, seed: int, n_tokens: int = 5) -> np.ndarray:
    """Hard negatives: up to `n` rows, drawn uniformly from the kept rows on which the feature is silent although the
    token is one of the `n_tokens` that it fires on most often. Ascending."""
    ids, counts = np.unique(index.tokens_of(rows), return_counts=True)
    usual = ids[np.lexsort((ids, -counts))[:n_tokens]]
    is_usual = np.zeros(int(index.all_tokens.max(initial=0)) + 1, bool)
    is_usual[usual] = True
    found = (is_usual[index.all_tokens] & index.all_kept).reshape(-1)
    found[rows] = False
    return _drawn(np.flatnonzero(found), n, seed)


def neighbour_rows(index: FeatureIndex, feature: int, rows: np.ndarray, n: int, seed: int) -> tuple[int, np.ndarray]:
    """Hard negatives: the nearest feature by decoder cosine (-1: unknown), and up to `n` rows, drawn uniformly from the
    stronger half of its firings where `feature` is silent. Ascending."""
    nearest = int(index.panel("neighbours/id", feature)[0]) if index.has("neighbours/id") else -1
    if nearest < 0:
        return -1, rows[:0]
    its_rows, its_values = index.firings(nearest)
    strong = its_rows[its_values >= np.median(its_values)] if len(its_rows) else its_rows
    return nearest, _drawn(_silent(strong, rows), n, seed)


def _drawn(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(rows, min(n, len(rows)), replace=False))


def rows_before_tokens(
    index: FeatureIndex, rows: np.ndarray, values: np.ndarray, wanted: np.ndarray, n: int, seed: int
) -> tuple[np.ndarray, int]:
    """Up to `n` rows, drawn uniformly from the firings that a token in `wanted` follows, strongest first; and the
    number of such firings."""
    inside = np.flatnonzero(rows % index.seq_len < index.seq_len - 1)
    inside = inside[np.isin(index.tokens_of(rows[inside] + 1), wanted)]
    drawn = np.random.default_rng(seed).choice(inside, min(n, len(inside)), replace=False)
    return rows[drawn[np.argsort(-values[drawn], kind="stable")]], len(inside)


def rows_in_range(
    rows: np.ndarray, values: np.ndarray, low: float, high: float, n: int, seed: int
) -> tuple[np.ndarray, int]:
    """Up to `n` rows, drawn uniformly from the firings in (low, high], strongest first; and the number of these."""
    inside = np.flatnonzero((values > low) & (values <= high))
    drawn = np.random.default_rng(seed).choice(inside, min(n, len(inside)), replace=False)
    return rows[drawn[np.argsort(-values[drawn], kind="stable")]], len(inside)


def loss_shares(index: FeatureIndex, feature: int, counts: Sequence[int]) -> list[float | None]:
    """Each interval's estimated share of Σ|Δloss|, lowest first: its firings × mean |Δloss| of a sample of them.

    None for an interval without a sample, and for all if the index has no Δloss.
    """
    if not index.has("effects/interval_abs"):
        return [None] * len(counts)
    means, samples = (index.panel(f"effects/interval_{name}", feature) for name in ("abs", "samples"))
    mass = np.asarray(counts) * means
    total = mass[samples > 0].sum()
    return [float(m / total) if n and total > 0 else None for m, n in zip(mass, samples, strict=True)]


def intervals(
    rows: np.ndarray, values: np.ndarray, *, per_interval: int, seed: int, n: int = N_INTERVALS, by_rank: bool = False
) -> list[Interval]:
    """The firings in `n` intervals (low, high], highest first.

    The edges are linspace(0, max, n + 1); with `by_rank`, the quantiles i / n of the firings (the lowest at 0), so that
    the intervals hold equally many. Each has up to `per_interval` rows, drawn uniformly without replacement, strongest
    first.
    """
    if not len(values):
        return []
    edges = np.linspace(0.0, float(values.max()), n + 1)
    if by_rank:
        edges[1:] = np.quantile(values, np.arange(1, n + 1) / n, method="inverted_cdf")
    place = np.searchsorted(edges, values, side="left") - 1
    found = []
    for i in reversed(range(n)):
        inside = np.flatnonzero(place == i)
        rng = np.random.default_rng([seed, i])
        drawn = rng.choice(inside, min(per_interval, len(inside)), replace=False)
        drawn = drawn[np.argsort(-values[drawn], kind="stable")]
        found.append(Interval(edges[i], edges[i + 1], len(inside), len(inside) / len(values), rows[drawn]))
    return found


def examples(
    index: FeatureIndex,
    feature_rows: np.ndarray,
    feature_values: np.ndarray,
    wanted: np.ndarray,
    *,
    before: int,
    after: int,
) -> list[Example]:
    """The text around the rows `wanted`, with the activation of the feature that fires on `feature_rows`."""
    found = []
    for row in wanted.tolist():
        window = index.window(row, before, after)
        first_row = window.context * index.seq_len + window.start
        acts = np.zeros(len(window.token_ids), np.float32)
        lo, hi = np.searchsorted(feature_rows, [first_row, first_row + len(acts)])
        acts[feature_rows[lo:hi] - first_row] = feature_values[lo:hi]
        # Three more tokens on the left: a character may begin there, as it has up to four bytes.
        lead = index.tokens_at(window.context)[max(0, window.start - 3) : window.start]
        raw = [index.token_bytes(int(t)) for t in (*lead, *window.token_ids)]
        numbered = (index.rows or {}).get("tokens") in ("positions", "nothing")
        found.append(
            Example(
                row=row,
                value=float(acts[row - first_row]),
                context=window.context,
                start=window.start,
                hit=row - first_row,
                token_ids=window.token_ids,
                shown=_row_numbers(index, first_row, len(acts)) if numbered else pieces(raw)[len(lead) :],
                acts=acts,
                document=index.document_of(row),
                row_name=index.row_name(row),
                picture=picture_of(index, window.context),
            )
        )
    return found


def _row_numbers(index: FeatureIndex, first_row: int, n: int) -> list[list[Piece]]:
    """Rows without tokens, as the last number of their place in the array."""
    found = re.search(r"(\d+)\]$", index.row_name(first_row))
    first = int(found[1]) if found else first_row
    return [[("text", f"{number} ")] for number in range(first, first + n)]


def activation_histogram(values: np.ndarray, bins: int = 44) -> pd.DataFrame:
    """Histogram of the activations above zero in equal bins over (0, max]: low, high, count."""
    if not len(values):
        return pd.DataFrame({"low": [], "high": [], "count": []})
    edges = np.linspace(0.0, float(values.max()), bins + 1)
    place = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": counts})


def logit_histogram(index: FeatureIndex, feature: int) -> pd.DataFrame:
    """Histogram of the vocabulary by logit weight: low, high, count; empty in an index without logit weights."""
    if not index.has("logits/histogram"):
        return pd.DataFrame({"low": [], "high": [], "count": []})
    counts = index.panel("logits/histogram", feature)
    low, high = index.panel("logits/range", feature).astype(float)
    edges = np.linspace(low, high, len(counts) + 1)
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": counts})


@dataclass(frozen=True)
class TokenShare:
    """How often a feature fires on one token: `share` of its firings (precision) and `recall`, the share of the token's
    occurrences on which it fires; `mean` is its mean activation there."""

    token_id: int
    count: int
    share: float
    recall: float
    mean: float


def token_shares(index: FeatureIndex, rows: np.ndarray, values: np.ndarray, n: int) -> list[TokenShare]:
    """The `n` tokens a feature fires on most often (ties: lower id)."""
    if not len(rows):
        return []
    ids, inverse, counts = np.unique(index.tokens_of(rows), return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=values) / counts
    best = np.lexsort((ids, -counts))[:n]
    total = index.token_counts
    return [
        TokenShare(int(ids[i]), int(counts[i]), counts[i] / len(rows), counts[i] / total[ids[i]], float(means[i]))
        for i in best
    ]


def density(index: FeatureIndex) -> np.ndarray:
    """Firings per kept token [d_sae]. In a sampled index: what its source reported, nan if nothing."""
    return index.stats["density"] if index.sampled else index.stats["count"] / max(1, index.kept_tokens)


def flags(index: FeatureIndex) -> np.ndarray:
    """For each feature [d_sae]: "dead", "ultra-low", "dense" or ""; "absent" if a sampled index lacks it."""
    share = density(index)
    silent = (index.stats["count"] == 0) & ~(share > 0)
    unknown = silent & np.isnan(share)
    conditions = [unknown, silent, share < ULTRA_LOW, share > DENSE]
    return np.select(conditions, ["absent", "dead", "ultra-low", "dense"], "")


def logit_weights(index: FeatureIndex, side: str, feature: int, n: int) -> list[tuple[int, float]]:
    """(token id, logit weight) of the `n` tokens that a feature raises ("top") or lowers ("bottom") most, if known."""
    return index.logit_weights(side, feature)[:n]
