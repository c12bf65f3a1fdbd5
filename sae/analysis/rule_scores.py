"""How well short rules predict when units are active: features against neurons and controls, without a language model.

Each unit's rule (`sae.indexing.rules`) is learned on the even contexts of a text and scored on the odd ones. To compare
units of different densities, every unit counts as active on equally many rows: those of its largest activations.
Source: the question of Bricken et al. 2023, "How interpretable are the features?", with a rule instead of a rater.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float, Int

from sae.indexing.rules import Kind, best_rule

SHARES_ABOVE = (0.6, 0.8)
RESAMPLES = 1000


class Activations:
    """The rows of each unit's largest activations, block after block; memory grows with units · most alone."""

    def __init__(self, n_units: int, most: int) -> None:
        self.most, self._n_rows = most, 0
        self._rows = np.full((n_units, 2 * most), -1, np.int64)
        self._values = np.full((n_units, 2 * most), -np.inf, np.float32)
        self.firings = np.zeros(n_units, np.int64)

    def add(self, rows: Int[np.ndarray, " n"], units: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> None:
        """Activations above 0 of a block: row numbers, units and values, in any order."""
        order = np.lexsort((rows, -values, units))  # per unit by falling value, ties by row
        rows, units, values = rows[order], units[order], values[order]
        counts = np.bincount(units, minlength=len(self.firings))
        self.firings += counts
        rank = np.arange(len(units)) - (counts.cumsum() - counts)[units]
        kept = rank < self.most
        self._rows[units[kept], self.most + rank[kept]] = rows[kept]
        self._values[units[kept], self.most + rank[kept]] = values[kept]
        best = np.argsort(-self._values, axis=1, kind="stable")
        self._rows = np.take_along_axis(self._rows, best, 1)
        self._values = np.take_along_axis(self._values, best, 1)
        self._rows[:, self.most :], self._values[:, self.most :] = -1, -np.inf

    def rows_of(self, unit: int) -> Int[np.ndarray, " most"]:
        """The rows of the unit's `most` largest activations, ascending; fewer if it is active less often."""
        rows = self._rows[unit, : self.most]
        return np.sort(rows[rows >= 0])


class Score(NamedTuple):
    """A rule's scores on the contexts it was not learned on; `balanced_accuracy` is (TPR + TNR) / 2."""

    f1: float
    balanced_accuracy: float


def score_units(
    activations: Activations, kinds: list[Kind], keep: np.ndarray, *, seed: int = 0
) -> tuple[Float[np.ndarray, " scored"], Float[np.ndarray, " scored"]]:
    """Held-out F1 and balanced accuracy of the rules of all units that are active on at least `most` rows.

    A unit without a rule (all its rows in one half) scores 0 and 0.5. `keep` [contexts, seq_len]: rows of the text.
    """
    rng = np.random.default_rng(seed)
    scored = np.flatnonzero(activations.firings >= activations.most)
    found = [_score(activations.rows_of(int(unit)), kinds, keep, rng) for unit in scored]
    return np.array([score.f1 for score in found]), np.array([score.balanced_accuracy for score in found])


def _score(rows: Int[np.ndarray, " n"], kinds: list[Kind], keep: np.ndarray, rng: np.random.Generator) -> Score:
    seq_len, odd = keep.shape[1], int(keep[1::2].sum())
    rule = best_rule(rows, kinds, seq_len, rng)
    if rule is None:
        return Score(0.0, 0.5)
    positives = int(((rows // seq_len) % 2).sum())
    holds = float(kinds[rule.kind].occurrences[1][rule.keys].sum())
    false_alarms = holds * (1 - rule.precision)
    return Score(rule.f1, (rule.recall + 1 - false_alarms / max(1, odd - positives)) / 2)


class Estimate(TypedDict):
    value: float
    ci95: list[float]


def estimates(scores: Float[np.ndarray, " units"], *, seed: int = 0) -> dict[str, Estimate]:
    """The median and the shares above SHARES_ABOVE, with 95% percentile intervals of a bootstrap over units."""
    if not len(scores):
        return {}
    drawn = scores[np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, len(scores)))]
    resampled = np.vstack([scores[None], drawn])  # the scores themselves first
    found = {"median": np.median(resampled, axis=1)}
    found |= {f"above_{x:g}": (resampled > x).mean(axis=1) for x in SHARES_ABOVE}
    return {
        name: {"value": float(values[0]), "ci95": [float(end) for end in np.percentile(values[1:], (2.5, 97.5))]}
        for name, values in found.items()
    }


def survival(scores: Float[np.ndarray, " units"], at: Sequence[float]) -> list[float]:
    """The share of units that score at least x, for each x."""
    return [float((scores >= x).mean()) if len(scores) else float("nan") for x in at]
