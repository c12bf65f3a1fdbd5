"""Features that represent a domain of the text: the best feature's F1, and features that fire in one domain only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer

from sae.evaluation.blocks import Block, EvaluatedBlock
from sae.kernels.activations import SparseActs
from sae.parallel.mesh import Mesh

MIN_TOKENS = 200  # of a domain, both in the text on which features are chosen and in the text that judges them
MIN_FIRINGS = 10
PURE = 0.8

Number = TypeVar("Number", float, np.ndarray)


def f1(precision: Number, recall: Number) -> Number:
    """The harmonic mean of precision and recall; 0 where both are 0."""
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)  # type: ignore[no-any-return]


class DomainCounts(NamedTuple):
    """Firings of each feature in each domain, and the kept tokens of each; a last column may hold other text."""

    fired: Integer[np.ndarray, "features domains"]
    tokens: Integer[np.ndarray, " domains"]

    def precision_recall(self) -> tuple[Float[np.ndarray, "features domains"], Float[np.ndarray, "features domains"]]:
        """Of the test "the feature fires" for "the token belongs to the domain"."""
        firings = self.fired.sum(1, keepdims=True)
        return self.fired / np.maximum(firings, 1), self.fired / np.maximum(self.tokens, 1)


class DomainFirings:
    """Counts firings and kept tokens by domain; tokens of no listed domain are counted in a last column."""

    def __init__(self, d_sae: int, n_domains: int) -> None:
        self.counts = DomainCounts(np.zeros((d_sae, n_domains + 1), np.int64), np.zeros(n_domains + 1, np.int64))

    def add(self, fired: SparseActs, keep: Bool[np.ndarray, " rows"], domain: Int[np.ndarray, " rows"]) -> None:
        """`fired` holds the activations above zero of kept rows; `domain` is -1 for tokens of no listed domain."""
        table, tokens = self.counts
        column = np.where(domain < 0, len(tokens) - 1, domain)
        features, rows = fired.support.features.numpy().astype(np.int64), fired.support.rows.numpy()
        cells, firings = np.unique(features * len(tokens) + column[rows], return_counts=True)
        table.reshape(-1)[cells] += firings
        tokens += np.bincount(column[keep], minlength=len(tokens))

    def gather(self, mesh: Mesh) -> None:
        """The counts of all ranks together."""
        for table in self.counts:
            mesh.reduce_(torch.from_numpy(table), "sum", "world")

    def add_block(self, fired: SparseActs, block: Block) -> None:
        self.add(fired, block.keep.flatten().numpy(), block.domain.reshape(-1))


class DomainFeatures:
    """Accumulator of `domains`: features chosen on other text (`chosen_on`), judged on the evaluated blocks."""

    def __init__(self, domains: Sequence[str], d_sae: int, chosen_on: DomainCounts) -> None:
        self.domains, self._chosen_on = list(domains), chosen_on
        self._firings = DomainFirings(d_sae, len(self.domains))

    def add(self, evaluated: EvaluatedBlock) -> None:
        self._firings.add_block(evaluated.fired, evaluated.block)

    def gather(self, mesh: Mesh) -> None:
        self._firings.gather(mesh)

    def result(self) -> dict[str, Any]:
        return {"domains": domain_quality(self._chosen_on, self._firings.counts, self.domains)}


def best_features(chosen_on: DomainCounts, judged_on: DomainCounts, n_domains: int) -> list[dict[str, Any] | None]:
    """For each domain the feature with the best F1 on one text, with its scores on another text.

    Columns beyond `n_domains` are other text, which counts against precision. None where either text has fewer than
    MIN_TOKENS tokens of the domain.
    """
    best = f1(*chosen_on.precision_recall()).argmax(0)
    precision, recall = judged_on.precision_recall()
    found: list[dict[str, Any] | None] = []
    for domain, feature in enumerate(best[:n_domains].tolist()):
        if min(chosen_on.tokens[domain], judged_on.tokens[domain]) < MIN_TOKENS:
            found.append(None)
            continue
        p, r = float(precision[feature, domain]), float(recall[feature, domain])
        found.append({"feature": feature, "precision": p, "recall": r, "f1": float(f1(p, r))})
    return found


def domain_quality(chosen_on: DomainCounts, judged_on: DomainCounts, domains: Sequence[str]) -> dict[str, Any]:
    """The domain section of an evaluation: best features, their mean F1, and the number of pure features."""
    best = dict(zip(domains, best_features(chosen_on, judged_on, len(domains)), strict=True))
    known = [entry["f1"] for entry in best.values() if entry]
    by_domain = judged_on.fired[:, : len(domains)]
    pure = pure_features(judged_on, len(domains))
    pure_by_domain = np.bincount(by_domain[pure].argmax(1), minlength=len(domains)).tolist() if domains else []
    return {
        "best_feature": best,
        "mean_f1": float(np.mean(known)) if known else None,
        "pure_features": int(pure.sum()),
        "pure_by_domain": dict(zip(domains, pure_by_domain, strict=True)),
        "formula": "F1 of 'the feature fires' for 'the token is of the domain', on held-out tokens, the feature chosen "
        f"on {int(chosen_on.tokens.sum()):,} training tokens; domains with {MIN_TOKENS} tokens in each. Pure: fired on "
        f"{MIN_FIRINGS} held-out tokens or more, over {PURE:.0%} of them in one domain",
        "version": 1,
    }


def pure_features(counts: DomainCounts, n_domains: int) -> Bool[np.ndarray, " features"]:
    """Features that fired on at least MIN_FIRINGS tokens, more than PURE of them in one domain."""
    firings = counts.fired.sum(1)
    share = counts.fired[:, :n_domains].max(1, initial=0) / np.maximum(firings, 1)
    return np.asarray((firings >= MIN_FIRINGS) & (share > PURE))
