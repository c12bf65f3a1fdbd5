"""Two dictionaries on the same tokens: which features of one are features of the other.

Written by `sae compare A B` into `A/compare/<run of B>--<B>/`: `compare.json` (who, on what, the summaries with their
formulas) and three Parquet tables. `features_a.parquet` has one row per feature of A, in order:

    feature, firings, density       int64, int64, float64 over the tokens compared
    best, correlation               the feature of B with the largest activation Pearson; null where not analysed
    cosine_best, cosine             the feature of B with the largest decoder cosine; null between different spaces
    matched, matched_correlation    its partner in the one-to-one matching; null where it has none
    logit_correlation               Pearson of the two features' logit weights, with `best`; null without the models
    neuron, neuron_correlation      the most correlated neuron of A's own activations
    shuffled_correlation            the largest Pearson with B when B's tokens are shuffled: what chance gives

`features_b.parquet` is the same seen from B. `edges.parquet` lists splitting edges: a, b, correlation, masked_a,
masked_b, masked (the larger of the two), cosine; those with masked ≥ EDGE_MASKED, strongest first.
A feature is analysed when it fired on MIN_FIRINGS tokens: with fewer, a high correlation says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import sparse
from torch import Tensor

from sae.analysis.correlation import FeatureMoments, NeuronCorrelation, PairBlock, pair_blocks
from sae.analysis.matching import one_to_one
from sae.analysis.recorder import Recorder
from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import best_cosines, unit
from sae.evaluation.metrics import number
from sae.indexing.correlation import FeatureNeuronCorrelation
from sae.jobs.progress import progress

COMPARE_FORMAT = 1
MIN_FIRINGS = 10
MATCH_FLOOR = 0.1  # pairs below this correlation are no candidates for the matching
EDGE_MASKED = 0.4
MAX_EDGES = 1_000_000
MAX_ACTIVATIONS = 100_000_000  # of both together, 16 bytes each
DIRECTIONS_AT_ONCE = 512

LogitWeights = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_vocab"]]


class PairedBlock(NamedTuple):
    """The same tokens as each of the two models sees them; where both are one model, x_b is x_a."""

    x_a: Float[Tensor, "rows d_in_a"]
    x_b: Float[Tensor, "rows d_in_b"]
    kept: Bool[Tensor, " rows"]


@dataclass
class Comparison:
    """What `compare` found: the content of compare.json and the columns of the three tables."""

    summary: dict[str, Any]
    tables: dict[str, dict[str, np.ndarray]]


@torch.inference_mode()
def compare(
    a: SAE,
    b: SAE,
    blocks: Iterable[PairedBlock],
    *,
    tokens: int,
    same_space: bool,
    logit_weights: tuple[LogitWeights, LogitWeights] | None = None,
    seed: int = 0,
) -> Comparison:
    """Encodes each block with both, then compares every pair of features from exact sums.

    `same_space`: both read the same activations, so decoder rows can be compared, and neurons are the same neurons.
    Memory: 16 bytes per activation of either, and slices of the pair table.
    Raises: ValueError when no token is kept.
    """
    seen = _encode(a, b, blocks, tokens)
    if seen.acts_a.shape[0] == 0:
        raise ValueError("compare: no kept token to compare on; harvest more text.")
    pairs = Pairs.of(seen.acts_a, seen.acts_b, masked=True)
    order = np.random.default_rng(seed).permutation(seen.acts_b.shape[0])
    chance = Pairs.of(seen.acts_a, seen.acts_b[order], masked=False)
    edge_a, edge_b, edge_correlation = pairs.candidates
    matched_a, matched_b = one_to_one(edge_a, edge_b, edge_correlation, (a.d_sae, b.d_sae))
    cosines = best_cosines(a.W_dec, b.W_dec) if same_space else None
    weights = logit_weights or (None, None)
    tables = {
        "features_a": _table(
            pairs.a,
            pairs.best_of_a,
            matched_a,
            pairs.matched_correlation(matched_a),
            chance.best_of_a[1],
            seen.neurons_a,
            (cosines.of_a, cosines.cosine_a) if cosines else None,
            _logit_correlations(a, b, pairs.best_of_a[0], weights),
        ),
        "features_b": _table(
            pairs.b,
            pairs.best_of_b,
            matched_b,
            pairs.matched_correlation(matched_a, inverse=True),
            chance.best_of_b[1],
            seen.neurons_b,
            (cosines.of_b, cosines.cosine_b) if cosines else None,
            _logit_correlations(b, a, pairs.best_of_b[0], weights[::-1]),
        ),
        "edges": _edges(pairs, a, b, same_space),
    }
    return Comparison(_summary(seen, pairs, tables, same_space), tables)


# --- one pass over the tokens ----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Both dictionaries' activations, and how each model's neurons go with features and with each other."""

    acts_a: sparse.csr_array
    acts_b: sparse.csr_array
    neurons_a: tuple[np.ndarray, np.ndarray]
    neurons_b: tuple[np.ndarray, np.ndarray]
    between_neurons: np.ndarray


def _encode(a: SAE, b: SAE, blocks: Iterable[PairedBlock], tokens: int) -> Seen:
    recorded = Recorder(a.d_sae), Recorder(b.d_sae)
    to_neurons = FeatureNeuronCorrelation(a.d_sae, a.d_in), FeatureNeuronCorrelation(b.d_sae, b.d_in)
    between = NeuronCorrelation(a.d_in, b.d_in)
    with progress("compare", tokens, "tok") as bar:
        for block in blocks:
            for sae, x, recorder, correlation in zip((a, b), (block.x_a, block.x_b), recorded, to_neurons, strict=True):
                acts = sae.feature_acts(x).sparse()
                recorder.add(acts, block.kept)
                correlation.add(
                    acts.where(block.kept[acts.support.rows] & (acts.values > 0)), x, block.kept
                )  # kept ones alone
            if sum(recorder.recorded for recorder in recorded) > MAX_ACTIVATIONS:
                raise ValueError(
                    f"compare: more than {MAX_ACTIVATIONS:,} activations in the first {bar.n:,.0f} tokens; these "
                    "dictionaries are too dense to hold. Give fewer --tokens."
                )
            between.add(block.x_a[block.kept], block.x_b[block.kept])
            bar.update(int(block.kept.sum()))
    matrices = [correlation.matrix().astype(np.float32) for correlation in to_neurons]
    neurons = [(found.argmax(1), found.max(1).astype(np.float64)) for found in matrices]
    return Seen(recorded[0].matrix(), recorded[1].matrix(), neurons[0], neurons[1], between.matrix())


# --- every pair of features ------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """The best of each feature, the candidates for a matching, and the splitting edges, gathered slice by slice."""

    a: FeatureMoments
    b: FeatureMoments
    best_of_a: tuple[np.ndarray, np.ndarray]
    best_of_b: tuple[np.ndarray, np.ndarray]
    candidates: tuple[np.ndarray, np.ndarray, np.ndarray]
    edges: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, acts_a: sparse.csr_array, acts_b: sparse.csr_array, *, masked: bool) -> Pairs:
        of_a, of_b = FeatureMoments.of(acts_a), FeatureMoments.of(acts_b)
        alive_a, alive_b = of_a.firings >= MIN_FIRINGS, of_b.firings >= MIN_FIRINGS
        best_a, best_b = _nothing(len(alive_a)), _nothing(len(alive_b))
        candidates: list[tuple[np.ndarray, ...]] = []
        edges: list[dict[str, np.ndarray]] = []
        for block in pair_blocks(acts_a, acts_b, masked=masked):
            rows = slice(block.start, block.start + len(block.pearson))
            analysed = np.outer(alive_a[rows], alive_b)
            pearson = np.where(analysed, block.pearson, -np.inf)
            _improve(best_a, best_b, pearson, block.start)
            if masked:
                i, j = np.nonzero(pearson > MATCH_FLOOR)
                candidates.append((i + block.start, j, pearson[i, j]))
                edges.append(_edges_of(block, analysed))
        for (partner, correlation), alive in ((best_a, alive_a), (best_b, alive_b)):
            unknown = ~alive | ~np.isfinite(correlation)
            partner[unknown], correlation[unknown] = -1, np.nan
        columns = list(zip(*candidates, strict=True)) if candidates else [[np.empty(0, np.int64)]] * 3
        found = cls(of_a, of_b, best_a, best_b, tuple(np.concatenate(c) for c in columns))  # type: ignore[arg-type]
        found.edges = _strongest(edges)
        return found

    def matched_correlation(self, matched_a: np.ndarray, *, inverse: bool = False) -> np.ndarray:
        """The correlation of each feature of A (of B: `inverse`) with its partner; NaN where it has none."""
        a, b, correlation = self.candidates
        chosen = matched_a[a] == b
        found = np.full(len(self.b.firings if inverse else self.a.firings), np.nan)
        found[(b if inverse else a)[chosen]] = correlation[chosen]
        return found


def _nothing(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(n, -1, np.int64), np.full(n, -np.inf)


def _improve(
    best_a: tuple[np.ndarray, np.ndarray], best_b: tuple[np.ndarray, np.ndarray], pearson: np.ndarray, start: int
) -> None:
    rows, columns = np.arange(len(pearson)), np.arange(pearson.shape[1])
    partner = pearson.argmax(1)
    best_a[0][start + rows], best_a[1][start + rows] = partner, pearson[rows, partner]
    partner = pearson.argmax(0)
    better = pearson[partner, columns] > best_b[1]
    best_b[0][better] = partner[better] + start
    best_b[1][better] = pearson[partner, columns][better]


def _edges_of(block: PairBlock, analysed: np.ndarray) -> dict[str, np.ndarray]:
    assert block.masked_a is not None
    assert block.masked_b is not None
    larger = np.where(analysed, np.maximum(block.masked_a, block.masked_b), 0)
    i, j = np.nonzero(larger >= EDGE_MASKED)
    return {
        "a": i + block.start,
        "b": j,
        "correlation": block.pearson[i, j],
        "masked_a": block.masked_a[i, j],
        "masked_b": block.masked_b[i, j],
        "masked": larger[i, j],
    }


def _strongest(edges: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if not edges:
        return {}
    joined = {name: np.concatenate([part[name] for part in edges]) for name in edges[0]}
    order = np.lexsort((joined["b"], joined["a"], -joined["masked"]))[:MAX_EDGES]
    return {name: column[order] for name, column in joined.items()}


# --- what is written -------------------------------------------------------------------------------------------------


def _table(
    moments: FeatureMoments,
    best: tuple[np.ndarray, np.ndarray],
    matched: np.ndarray,
    matched_correlation: np.ndarray,
    chance: np.ndarray,
    neurons: tuple[np.ndarray, np.ndarray],
    cosines: tuple[np.ndarray, np.ndarray] | None,
    logit_correlation: np.ndarray,
) -> dict[str, np.ndarray]:
    n = len(moments.firings)
    analysed = moments.firings >= MIN_FIRINGS
    return {
        "feature": np.arange(n),
        "firings": moments.firings,
        "density": moments.firings / moments.tokens,
        "best": _or_null(best[0]),
        "correlation": best[1],
        "cosine_best": _or_null(cosines[0]) if cosines else _or_null(np.full(n, -1)),
        "cosine": cosines[1].astype(np.float64) if cosines else np.full(n, np.nan),
        "matched": _or_null(matched),
        "matched_correlation": matched_correlation,
        "logit_correlation": logit_correlation,
        "neuron": _or_null(np.where(analysed, neurons[0], -1)),
        "neuron_correlation": np.where(analysed, neurons[1], np.nan),
        "shuffled_correlation": chance,
    }


def _or_null(ids: np.ndarray) -> np.ndarray:
    """Feature numbers with −1 masked, so that Parquet holds integers and nulls."""
    return np.ma.masked_equal(ids.astype(np.int64), -1)


def _edges(pairs: Pairs, a: SAE, b: SAE, same_space: bool) -> dict[str, np.ndarray]:
    i, j = pairs.edges["a"], pairs.edges["b"]
    cosine = np.full(len(i), np.nan)
    if same_space:
        of_a, of_b = unit(a.W_dec.float()), unit(b.W_dec.float())
        for start in range(0, len(i), 1 << 16):
            part = slice(start, start + (1 << 16))
            cosine[part] = (of_a[torch.from_numpy(i[part])] * of_b[torch.from_numpy(j[part])]).sum(-1).numpy()
    return {**pairs.edges, "cosine": cosine}


def _logit_correlations(a: SAE, b: SAE, best: np.ndarray, weights: tuple[LogitWeights | None, ...]) -> np.ndarray:
    """Pearson over the vocabulary of each feature's logit weights with its best match's; NaN where there is none."""
    found = np.full(a.d_sae, np.nan)
    of_a, of_b = weights
    if of_a is None or of_b is None:
        return found
    matched = np.flatnonzero(best >= 0)
    for start in range(0, len(matched), DIRECTIONS_AT_ONCE):
        chunk = matched[start : start + DIRECTIONS_AT_ONCE]
        left, right = (
            logits - logits.mean(-1, keepdim=True)
            for logits in (of_a(a.W_dec[torch.from_numpy(chunk)]), of_b(b.W_dec[torch.from_numpy(best[chunk])]))
        )
        found[chunk] = torch.cosine_similarity(left, right, dim=-1).cpu().numpy()
    return found


FORMULAS = {
    "features_a_to_b": "for each analysed feature of A the largest activation Pearson with a feature of B",
    "features_b_to_a": "for each analysed feature of B the largest activation Pearson with a feature of A",
    "features_to_neurons": "for each analysed feature of A the largest Pearson with a neuron of its own activations",
    "neurons_a_to_b": "for each neuron of A's model that varies the largest Pearson with a neuron of B's model",
    "shuffled": "features_a_to_b with B's tokens in a shuffled order: what the largest of many gives by chance",
    "matched": "Pearson of the pairs of the one-to-one matching with the largest sum, over pairs above the floor",
    "decoder_a_to_b": "for each analysed feature of A the largest decoder cosine with a feature of B (MMCS: its mean)",
    "decoder_b_to_a": "for each analysed feature of B the largest decoder cosine with a feature of A (MMCS: its mean)",
    "logits": "Pearson over the vocabulary of the logit weights of each analysed feature of A and its best match",
}
PUBLISHED = {
    "source": "Bricken et al. 2023, A/1 against B/1 over 40,960,000 tokens",
    "features_a_to_b": 0.72,
    "neurons_a_to_b": 0.46,
}


def _summary(seen: Seen, pairs: Pairs, tables: dict[str, dict[str, np.ndarray]], same_space: bool) -> dict[str, Any]:
    of_a, of_b = tables["features_a"], tables["features_b"]
    alive_a, alive_b = (table["firings"] >= MIN_FIRINGS for table in (of_a, of_b))
    # Neurons are the features' baseline: between two models, each with the best of the other.
    neurons = seen.between_neurons[(seen.between_neurons != 0).any(1)].max(1, initial=-1.0)
    values = {
        "features_a_to_b": of_a["correlation"],
        "features_b_to_a": of_b["correlation"],
        "features_to_neurons": of_a["neuron_correlation"],
        "neurons_a_to_b": np.empty(0) if same_space else neurons,
        "shuffled": of_a["shuffled_correlation"],
        "matched": of_a["matched_correlation"],
        "decoder_a_to_b": of_a["cosine"][alive_a],
        "decoder_b_to_a": of_b["cosine"][alive_b],
        "logits": of_a["logit_correlation"],
    }
    return {
        "kind": "comparison",
        "format": COMPARE_FORMAT,
        "tokens": seen.acts_a.shape[0],
        "same_space": same_space,
        "min_firings": MIN_FIRINGS,
        "match_floor": MATCH_FLOOR,
        "edge_masked": EDGE_MASKED,
        "summary": {name: {**distribution(column), "formula": FORMULAS[name]} for name, column in values.items()},
        "counts": {
            side: {
                "features": len(table["firings"]),
                "analysed": int(alive.sum()),
                "matched": int((~np.ma.getmaskarray(table["matched"])).sum()),
                "unmatched": int((alive & np.ma.getmaskarray(table["matched"])).sum()),
            }
            for side, table, alive in (("a", of_a, alive_a), ("b", of_b, alive_b))
        }
        | {"edges": len(tables["edges"]["a"])},
        "published": PUBLISHED,
        "tables": {name: f"{name}.parquet" for name in tables},
    }


def distribution(values: np.ndarray) -> dict[str, Any]:
    """Count, mean, quantiles and a histogram over −1 … 1 of the numbers among `values`; nulls where there is none."""
    known = values[np.isfinite(values)].astype(np.float64)
    quantiles = np.percentile(known, [5, 25, 50, 75, 95]) if len(known) else np.full(5, np.nan)
    histogram, _ = np.histogram(known, bins=40, range=(-1, 1))
    return {
        "n": len(known),
        "mean": number(known.mean() if len(known) else np.nan),
        **{name: number(q) for name, q in zip(("p5", "p25", "median", "p75", "p95"), quantiles, strict=True)},
        "share_above_half": number((known > 0.5).mean() if len(known) else np.nan),
        "histogram": histogram.tolist(),
    }
