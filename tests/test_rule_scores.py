"""Rule scores against units planted in a made-up text, and against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sae.analysis.rule_scores import Activations, estimates, score_units, survival
from sae.indexing.rules import kinds_of_rule

CONTEXTS, SEQ_LEN, TOKENS = 200, 16, 40


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(TOKENS, size=(CONTEXTS, SEQ_LEN))
    return (
        tokens,
        rng.random(tokens.shape) < 0.9,
        np.repeat(rng.integers(3, size=CONTEXTS), SEQ_LEN).reshape(tokens.shape),
    )


def activations(fires: np.ndarray, values: np.ndarray, most: int, blocks: int = 3) -> Activations:
    """`fires` and `values` [rows, units], added in blocks of unequal size and in a random order of entries."""
    found, rng = Activations(fires.shape[1], most), np.random.default_rng(1)
    for rows in np.array_split(np.arange(len(fires)), blocks):
        r, u = np.nonzero(fires[rows])
        order = rng.permutation(len(r))
        found.add(rows[r][order], u[order], values[rows][r, u][order].astype(np.float32))
    return found


def test_the_largest_activations_are_kept_whatever_the_blocks() -> None:
    rng = np.random.default_rng(2)
    values = rng.random((300, 5))
    fires = rng.random((300, 5)) < [0.9, 0.5, 0.1, 0.01, 0.0]
    for blocks in (1, 2, 7):
        found = activations(fires, values, 20, blocks)
        assert (found.firings == fires.sum(0)).all()
        for unit in range(5):
            active = np.flatnonzero(fires[:, unit])
            largest = active[np.argsort(-values[active, unit].astype(np.float32), kind="stable")][:20]
            assert found.rows_of(unit).tolist() == sorted(largest.tolist())


def test_a_planted_token_scores_one_and_chance_scores_half(text: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    tokens, keep, domain = text
    rng = np.random.default_rng(3)
    flat, kept = tokens.reshape(-1), keep.reshape(-1)
    by_token, by_chance = (flat == 7) & kept, (rng.random(len(flat)) < 0.02) & kept
    most = int(by_token.sum())
    values = np.ones((len(flat), 3))
    fires = np.stack([by_token, by_chance, np.arange(len(flat)) < 3], 1)
    found = activations(fires, values, min(most, int(by_chance.sum())))
    f1, accuracy = score_units(found, kinds_of_rule(tokens, keep, np.where(keep, domain, -1)), keep)
    assert len(f1) == 2  # the third unit is active too rarely
    assert f1[0] > 0.85  # 1 but for the rows that were cut to have equally many
    assert accuracy[0] > 0.9
    assert f1[1] < 0.2
    assert accuracy[1] == pytest.approx(0.5, abs=0.08)


def test_scores_equal_counting_by_hand(text: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """A unit that fires on most of two tokens: the rule must be these tokens; its hits are counted row by row."""
    tokens, keep, domain = text
    rng = np.random.default_rng(4)
    flat, kept = tokens.reshape(-1), keep.reshape(-1)
    fires = np.isin(flat, (3, 11)) & kept & (rng.random(len(flat)) < 0.8)
    found = activations(fires[:, None], np.ones((len(flat), 1)), int(fires.sum()))
    (f1,), (accuracy,) = score_units(found, kinds_of_rule(tokens, keep, np.where(keep, domain, -1)), keep)
    odd = (np.arange(len(flat)) // SEQ_LEN % 2 == 1) & kept
    holds = np.isin(flat, (3, 11))
    tp, fp, fn, tn = (
        int((odd & (holds == said) & (fires == true)).sum())
        for said, true in ((True, True), (True, False), (False, True), (False, False))
    )
    assert f1 == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert accuracy == pytest.approx((tp / (tp + fn) + tn / (tn + fp)) / 2)


def test_estimates_hold_the_median_and_shares_and_their_intervals() -> None:
    scores = np.linspace(0, 1, 101)
    found = estimates(scores)
    assert found["median"]["value"] == 0.5
    assert found["above_0.6"]["value"] == pytest.approx(40 / 101)
    assert found["above_0.8"]["value"] == pytest.approx(20 / 101)
    share = 40 / 101
    half_width = 1.96 * (share * (1 - share) / 101) ** 0.5  # of a binomial share
    assert found["above_0.6"]["ci95"] == pytest.approx([share - half_width, share + half_width], abs=0.02)
    assert estimates(np.empty(0)) == {}
    assert survival(scores, [0.0, 0.5, 1.0]) == pytest.approx([1.0, 51 / 101, 1 / 101])
