"""Two dictionaries on the same tokens: which features of one are features of the other.

`sae compare A B` writes `compare.json` (the dictionaries, the text, the summaries with their formulas) and three
Parquet tables into `A/compare/<run of B>--<B>/`. `features_a.parquet` has one row per feature of A, in order:

    feature, firings, density       int64, int64, float64 over the tokens compared
    best, correlation               the feature of B with the largest activation Pearson; null where not analysed
    cosine_best, cosine             the feature of B with the largest decoder cosine; null between different spaces
    matched, matched_correlation    its partner in the one-to-one matching; null where it has none
    logit_correlation               Pearson of its logit weights with those of `best`; null without a linear path
    neuron, neuron_correlation      the most correlated neuron of the activations that A reads
    shuffled_correlation            the largest Pearson with B when B's tokens are shuffled: what chance gives

`features_b.parquet` is the same table for B. `edges.parquet` lists splitting edges: a, b, correlation, masked_a,
masked_b, masked (the larger of the two), cosine; those with masked ≥ EDGE_MASKED, strongest first.
A feature is analysed when it fired on at least MIN_FIRINGS tokens: with fewer, a high correlation means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy import sparse
from torch import Tensor

from sae.analysis.correlation import FeatureMoments, NeuronCorrelation
from sae.analysis.feature_pairs import (
    EDGE_MASKED,
    MATCH_FLOOR,
    MIN_FIRINGS,
    FeaturePairs,
    Partners,
    analysed,
    best_partners,
    feature_pairs,
)
from sae.analysis.recorder import Recorder
from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import DIRECTIONS_AT_ONCE, best_cosines, unit
from sae.evaluation.metrics import number
from sae.indexing.correlation import FeatureNeuronCorrelation
from sae.jobs.progress import progress

COMPARE_FORMAT = 1
MAX_ACTIVATIONS = 100_000_000  # of both dictionaries together, 16 bytes each
EDGES_AT_ONCE = 1 << 16

LogitWeights = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_vocab"]]
Columns = dict[str, np.ndarray]


class PairedBlock(NamedTuple):
    """The activations of the same tokens in the models of A and of B; x_b is x_a where both read the same ones."""

    x_a: Float[Tensor, "rows d_in_a"]
    x_b: Float[Tensor, "rows d_in_b"]
    kept: Bool[Tensor, " rows"]


@dataclass
class Comparison:
    """The result of `compare`: the content of compare.json and the columns of the three tables."""

    summary: dict[str, Any]
    tables: dict[str, Columns]


@torch.inference_mode()
def compare(
    a: SAE,
    b: SAE,
    blocks: Iterable[PairedBlock],
    *,
    tokens: int,
    same_space: bool,
    same_outputs: bool | None = None,
    logit_weights: tuple[LogitWeights, LogitWeights] | None = None,
    seed: int = 0,
) -> Comparison:
    """Encodes each block with both dictionaries, then compares every pair of features from exact sums.

    `same_space`: both read the same activations, so that neurons are the same neurons; `same_outputs` (default: the
    same): both write to the same ones, so that decoder rows can be compared. They differ for transcoders only.
    Memory: 16 bytes per activation of either dictionary, and slices of the table of pairs.
    Raises: ValueError when no token is kept, or when there are more activations than fit in memory.
    """
    same_outputs = same_space if same_outputs is None else same_outputs
    seen = _encode(a, b, blocks, tokens)
    if seen.tokens == 0:
        raise ValueError("compare: no kept token to compare on; harvest more text.")
    pairs = feature_pairs(seen.acts_a, seen.acts_b)
    matched_a, matched_b = pairs.candidates.matching(a.d_sae, b.d_sae)
    shuffled_a, shuffled_b = best_partners(seen.acts_a, seen.shuffled_b(seed))
    cosine_a, cosine_b = _nearest_decoder_rows(a, b, same_outputs)
    to_logits_a, to_logits_b = logit_weights or (None, None)
    side_a = Side(
        moments=pairs.a,
        best=pairs.best_of_a,
        matched=matched_a,
        shuffled=shuffled_a,
        neurons=seen.neurons_a,
        cosines=cosine_a,
        logit_correlation=_logit_correlations(a, b, pairs.best_of_a, to_logits_a, to_logits_b),
    )
    side_b = Side(
        moments=pairs.b,
        best=pairs.best_of_b,
        matched=matched_b,
        shuffled=shuffled_b,
        neurons=seen.neurons_b,
        cosines=cosine_b,
        logit_correlation=_logit_correlations(b, a, pairs.best_of_b, to_logits_b, to_logits_a),
    )
    tables = {
        "features_a": side_a.table(),
        "features_b": side_b.table(),
        "edges": pairs.edges | {"cosine": _edge_cosines(pairs, a, b, same_outputs)},
    }
    return Comparison(_summary(side_a, side_b, seen, len(pairs.edges["a"]), same_space, same_outputs), tables)


# --- one pass over the tokens ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """The activations of both dictionaries, their features' best neurons, and the correlations between neurons."""

    acts_a: sparse.csr_array
    acts_b: sparse.csr_array
    neurons_a: Partners
    neurons_b: Partners
    between_neurons: Float64[np.ndarray, "d_in_a d_in_b"]

    @property
    def tokens(self) -> int:
        return int(self.acts_a.shape[0])

    def shuffled_b(self, seed: int) -> sparse.csr_array:
        """The activations of B with its tokens in a random order."""
        return self.acts_b[np.random.default_rng(seed).permutation(self.tokens)]


class _Encoder:
    """One dictionary over the blocks: records its activations and correlates them with the neurons that it reads."""

    def __init__(self, sae: SAE) -> None:
        self._sae, self.recorder = sae, Recorder(sae.d_sae)
        self._to_neurons = FeatureNeuronCorrelation(sae.d_sae, sae.d_in)

    def add(self, x: Float[Tensor, "rows d_in"], kept: Bool[Tensor, " rows"]) -> None:
        acts = self._sae.feature_acts(x).sparse()
        self.recorder.add(acts, kept)
        self._to_neurons.add(acts.firings(kept), x, kept)

    def best_neurons(self) -> Partners:
        correlations = self._to_neurons.matrix().astype(np.float32)
        return Partners(correlations.argmax(1), correlations.max(1).astype(np.float64))


def _encode(a: SAE, b: SAE, blocks: Iterable[PairedBlock], tokens: int) -> Seen:
    of_a, of_b, between = _Encoder(a), _Encoder(b), NeuronCorrelation(a.d_in, b.d_in)
    with progress("compare", tokens, "tok") as bar:
        for block in blocks:
            of_a.add(block.x_a, block.kept)
            of_b.add(block.x_b, block.kept)
            if of_a.recorder.recorded + of_b.recorder.recorded > MAX_ACTIVATIONS:
                raise ValueError(
                    f"compare: more than {MAX_ACTIVATIONS:,} activations in the first {bar.n:,.0f} tokens; these "
                    "dictionaries have too many active features per token for the memory. Give fewer --tokens."
                )
            between.add(block.x_a[block.kept], block.x_b[block.kept])
            bar.update(int(block.kept.sum()))
    acts_a, acts_b = of_a.recorder.matrix(), of_b.recorder.matrix()
    return Seen(acts_a, acts_b, of_a.best_neurons(), of_b.best_neurons(), between.matrix())


# --- similarity of weights -------------------------------------------------------------------------------------------


def _nearest_decoder_rows(a: SAE, b: SAE, same_outputs: bool) -> tuple[Partners, Partners]:
    """The nearest decoder row in the other dictionary, each way; no partner between different spaces."""
    if not same_outputs:
        nothing = (Partners(np.full(n, -1), np.full(n, np.nan)) for n in (a.d_sae, b.d_sae))
        of_a, of_b = nothing
        return of_a, of_b
    best = best_cosines(a.W_dec, b.W_dec)
    return (
        Partners(best.of_a, best.cosine_a.astype(np.float64)),
        Partners(best.of_b, best.cosine_b.astype(np.float64)),
    )


def _edge_cosines(pairs: FeaturePairs, a: SAE, b: SAE, same_outputs: bool) -> Float64[np.ndarray, " edges"]:
    """The decoder cosine of each splitting edge; NaN between different spaces."""
    i, j = torch.from_numpy(pairs.edges["a"]), torch.from_numpy(pairs.edges["b"])
    cosine = np.full(len(i), np.nan)
    if same_outputs:
        directions_a, directions_b = unit(a.W_dec.float()), unit(b.W_dec.float())
        for start in range(0, len(i), EDGES_AT_ONCE):
            part = slice(start, start + EDGES_AT_ONCE)
            cosine[part] = (directions_a[i[part]] * directions_b[j[part]]).sum(-1).numpy()
    return cosine


def _logit_correlations(
    sae: SAE, other: SAE, best: Partners, of_sae: LogitWeights | None, of_other: LogitWeights | None
) -> Float64[np.ndarray, " d_sae"]:
    """Pearson over the vocabulary of each feature's logit weights with its best partner's; NaN without a partner."""
    found = np.full(sae.d_sae, np.nan)
    if of_sae is None or of_other is None:
        return found
    with_partner = np.flatnonzero(best.ids >= 0)
    for start in range(0, len(with_partner), DIRECTIONS_AT_ONCE):
        chunk = with_partner[start : start + DIRECTIONS_AT_ONCE]
        mine = _centred(of_sae(sae.W_dec[torch.from_numpy(chunk)]))
        partners = _centred(of_other(other.W_dec[torch.from_numpy(best.ids[chunk])]))
        found[chunk] = torch.cosine_similarity(mine, partners, dim=-1).cpu().numpy()
    return found


def _centred(logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
    return logits - logits.mean(-1, keepdim=True)


# --- what is written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Everything found about one dictionary's features, compared with the other dictionary."""

    moments: FeatureMoments
    best: Partners
    matched: Partners
    shuffled: Partners
    neurons: Partners
    cosines: Partners
    logit_correlation: Float64[np.ndarray, " d_sae"]

    @property
    def analysed(self) -> Bool[np.ndarray, " d_sae"]:
        return analysed(self.moments)

    def table(self) -> Columns:
        """The columns of the Parquet table."""
        neurons = self.neurons.where(self.analysed)
        return {
            "feature": np.arange(len(self.moments.firings)),
            "firings": self.moments.firings,
            "density": self.moments.firings / self.moments.tokens,
            "best": _or_null(self.best.ids),
            "correlation": self.best.similarity,
            "cosine_best": _or_null(self.cosines.ids),
            "cosine": self.cosines.similarity,
            "matched": _or_null(self.matched.ids),
            "matched_correlation": self.matched.similarity,
            "logit_correlation": self.logit_correlation,
            "neuron": _or_null(neurons.ids),
            "neuron_correlation": neurons.similarity,
            "shuffled_correlation": self.shuffled.similarity,
        }

    def counts(self) -> dict[str, int]:
        has_match = self.matched.ids >= 0
        return {
            "features": len(self.analysed),
            "analysed": int(self.analysed.sum()),
            "matched": int(has_match.sum()),
            "unmatched": int((self.analysed & ~has_match).sum()),
        }


def _or_null(ids: Int[np.ndarray, " n"]) -> np.ma.MaskedArray[Any, Any]:
    """Feature numbers with −1 masked, so that Parquet holds integers and nulls."""
    return np.ma.masked_equal(ids.astype(np.int64), -1)


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


def _summary(a: Side, b: Side, seen: Seen, n_edges: int, same_space: bool, same_outputs: bool) -> dict[str, Any]:
    # Between two models, the best neuron of the other model for each neuron is the baseline for features.
    neurons = seen.between_neurons[(seen.between_neurons != 0).any(1)].max(1, initial=-1.0)
    values = {
        "features_a_to_b": a.best.similarity,
        "features_b_to_a": b.best.similarity,
        "features_to_neurons": a.neurons.where(a.analysed).similarity,
        "neurons_a_to_b": np.empty(0) if same_space else neurons,
        "shuffled": a.shuffled.similarity,
        "matched": a.matched.similarity,
        "decoder_a_to_b": a.cosines.similarity[a.analysed],
        "decoder_b_to_a": b.cosines.similarity[b.analysed],
        "logits": a.logit_correlation,
    }
    return {
        "kind": "comparison",
        "format": COMPARE_FORMAT,
        "tokens": seen.tokens,
        "same_space": same_space,
        "same_outputs": same_outputs,
        "min_firings": MIN_FIRINGS,
        "match_floor": MATCH_FLOOR,
        "edge_masked": EDGE_MASKED,
        "summary": {name: {**distribution(column), "formula": FORMULAS[name]} for name, column in values.items()},
        "counts": {"a": a.counts(), "b": b.counts(), "edges": n_edges},
        "published": PUBLISHED,
        "tables": {name: f"{name}.parquet" for name in ("features_a", "features_b", "edges")},
    }


def distribution(values: Float64[np.ndarray, " n"]) -> dict[str, Any]:
    """Count, mean, quantiles and a histogram over −1 … 1 of the finite values; nulls if no value is finite."""
    known = values[np.isfinite(values)]
    quantiles = np.percentile(known, [5, 25, 50, 75, 95]) if len(known) else np.full(5, np.nan)
    histogram, _ = np.histogram(known, bins=40, range=(-1, 1))
    return {
        "n": len(known),
        "mean": number(known.mean() if len(known) else np.nan),
        **{name: number(q) for name, q in zip(("p5", "p25", "median", "p75", "p95"), quantiles, strict=True)},
        "share_above_half": number((known > 0.5).mean() if len(known) else np.nan),
        "histogram": histogram.tolist(),
    }
