"""What the correlations of all pairs of features give: best partners, candidates for a matching, splitting edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int
from scipy import sparse

from sae.analysis.correlation import FeatureMoments, PairBlock, pair_blocks
from sae.analysis.matching import one_to_one

MIN_FIRINGS = 10  # features with fewer are not analysed: a high correlation would mean nothing
MATCH_FLOOR = 0.1  # pairs with a correlation up to this value are not candidates for the matching
EDGE_MASKED = 0.4
MAX_EDGES = 1_000_000


class Partners(NamedTuple):
    """A partner for each feature (−1: none) and their similarity (NaN: none)."""

    ids: Int[np.ndarray, " n"]
    similarity: Float64[np.ndarray, " n"]

    def where(self, known: Bool[np.ndarray, " n"]) -> Partners:
        """The same, with no partner where `known` is false."""
        return Partners(np.where(known, self.ids, -1), np.where(known, self.similarity, np.nan))


class Candidates(NamedTuple):
    """Pairs of analysed features with a correlation above MATCH_FLOOR."""

    a: Int[np.ndarray, " pairs"]
    b: Int[np.ndarray, " pairs"]
    correlation: Float64[np.ndarray, " pairs"]

    def matching(self, n_a: int, n_b: int) -> tuple[Partners, Partners]:
        """The one-to-one matching with the largest sum of correlations: the partners of A's features and of B's."""
        of_a, of_b = one_to_one(self.a, self.b, self.correlation, (n_a, n_b))
        chosen = of_a[self.a] == self.b
        correlation_a, correlation_b = np.full(n_a, np.nan), np.full(n_b, np.nan)
        correlation_a[self.a[chosen]] = correlation_b[self.b[chosen]] = self.correlation[chosen]
        return Partners(of_a, correlation_a), Partners(of_b, correlation_b)


@dataclass(frozen=True)
class FeaturePairs:
    """The pairs of two dictionaries' features that matter. `edges`: columns of the splitting edges, strongest first."""

    a: FeatureMoments
    b: FeatureMoments
    best_of_a: Partners
    best_of_b: Partners
    candidates: Candidates
    edges: dict[str, np.ndarray]


def analysed(moments: FeatureMoments) -> Bool[np.ndarray, " features"]:
    """Which features fired on enough tokens to be compared."""
    return np.asarray(moments.firings >= MIN_FIRINGS)


def feature_pairs(acts_a: sparse.csr_array, acts_b: sparse.csr_array) -> FeaturePairs:
    """Compares every feature of A with every feature of B, slice by slice."""
    a, b = FeatureMoments.of(acts_a), FeatureMoments.of(acts_b)
    best = _BestPartners(analysed(a), analysed(b))
    candidates = [Candidates(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    edges: list[dict[str, np.ndarray]] = []
    for block in pair_blocks(acts_a, acts_b, masked=True):
        pearson = best.add(block)
        i, j = np.nonzero(pearson > MATCH_FLOOR)
        candidates.append(Candidates(i + block.start, j, pearson[i, j]))
        edges.append(_edges(block, np.isfinite(pearson)))
    best_of_a, best_of_b = best.result()
    joined = Candidates(*(np.concatenate(column) for column in zip(*candidates, strict=True)))
    return FeaturePairs(a, b, best_of_a, best_of_b, joined, _strongest(edges))


def best_partners(acts_a: sparse.csr_array, acts_b: sparse.csr_array) -> tuple[Partners, Partners]:
    """For each feature of A the most correlated feature of B, and for each feature of B that of A."""
    best = _BestPartners(analysed(FeatureMoments.of(acts_a)), analysed(FeatureMoments.of(acts_b)))
    for block in pair_blocks(acts_a, acts_b):
        best.add(block)
    return best.result()


class _BestPartners:
    """The most correlated partner of each analysed feature of A and of B, from the blocks of pairs."""

    def __init__(self, analysed_a: Bool[np.ndarray, " n_a"], analysed_b: Bool[np.ndarray, " n_b"]) -> None:
        self._analysed = analysed_a, analysed_b
        self._of_a, self._of_b = (
            Partners(np.full(len(known), -1, np.int64), np.full(len(known), -np.inf)) for known in self._analysed
        )

    def add(self, block: PairBlock) -> Float64[np.ndarray, "n n_b"]:
        """Takes in a block; returns its correlations, −inf for a pair with a feature that is not analysed."""
        pearson = np.where(np.outer(self._analysed[0][block.features], self._analysed[1]), block.pearson, -np.inf)
        rows, columns = np.arange(len(pearson)), np.arange(pearson.shape[1])
        partner = pearson.argmax(1)
        self._of_a.ids[block.features], self._of_a.similarity[block.features] = partner, pearson[rows, partner]
        partner = pearson.argmax(0)
        better = pearson[partner, columns] > self._of_b.similarity
        self._of_b.ids[better] = partner[better] + block.start
        self._of_b.similarity[better] = pearson[partner, columns][better]
        return pearson

    def result(self) -> tuple[Partners, Partners]:
        of_a, of_b = (found.where(np.isfinite(found.similarity)) for found in (self._of_a, self._of_b))
        return of_a, of_b


def _edges(block: PairBlock, both_analysed: Bool[np.ndarray, "n n_b"]) -> dict[str, np.ndarray]:
    """The splitting edges of a block: pairs whose larger masked cosine reaches EDGE_MASKED."""
    assert block.masked_a is not None
    assert block.masked_b is not None
    larger = np.where(both_analysed, np.maximum(block.masked_a, block.masked_b), 0)
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
    """The MAX_EDGES strongest edges of all blocks, strongest first."""
    joined = {name: np.concatenate([part[name] for part in edges]) for name in edges[0]}
    order = np.lexsort((joined["b"], joined["a"], -joined["masked"]))[:MAX_EDGES]
    return {name: column[order] for name, column in joined.items()}
