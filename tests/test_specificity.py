"""Rules on hand-made text: the tokens they hold on, and the scores of a feature that fires there."""

from __future__ import annotations

import re

import numpy as np
import pytest
from browser_fixture import ARABIC, DNA, KEYWORD, build_index

from browser import specificity
from browser.specificity import Rule, RuleError, Text
from store.features import FeatureIndex


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    path = tmp_path_factory.mktemp("index") / "features.zarr"
    build_index(path, d_sae=12, n_contexts=96)
    return FeatureIndex.open(path)


@pytest.fixture(scope="module")
def text(index: FeatureIndex) -> Text:
    return specificity.read_text(index)


def tokens_where(index: FeatureIndex, holds: np.ndarray) -> set[bytes]:
    return {index.token_bytes(int(t)) for t in np.unique(index.all_tokens.reshape(-1)[holds])}


def test_a_match_marks_exactly_the_tokens_it_touches(index: FeatureIndex, text: Text) -> None:
    holds, _ = specificity.truth(index, text, Rule("regex", r"def|\bnumpy as\b"))
    raw = [
        index.token_bytes(int(t)) if k else b"\0"
        for t, k in zip(index.all_tokens.flat, index.all_kept.flat, strict=True)
    ]
    joined = b"".join(raw)
    touched = np.zeros(len(joined), bool)
    for match in re.finditer(rb"def|\bnumpy as\b", joined):
        touched[slice(*match.span())] = True
    ends = np.cumsum([len(r) for r in raw])
    expected = [bool(touched[end - len(r) : end].any()) for end, r in zip(ends, raw, strict=True)]
    np.testing.assert_array_equal(holds, expected)
    assert holds.sum() > 20


def test_characters_of_many_bytes_are_found_at_the_right_tokens(index: FeatureIndex, text: Text) -> None:
    holds, _ = specificity.truth(index, text, Rule("regex", "€"))
    assert tokens_where(index, holds) == {b"\xe2", b"\x82", b"\xac"}
    arabic, _ = specificity.truth(index, text, Rule("script", "Arabic"))
    assert all(any(0xD8 <= byte <= 0xDB for byte in token) for token in tokens_where(index, arabic))
    assert not arabic[index.domain_numbers != index.domains.index("arabic")].any()


def test_token_sets_and_domains(index: FeatureIndex, text: Text) -> None:
    holds, _ = specificity.truth(index, text, Rule("tokens", "␣the,␣The,no-such"))
    assert tokens_where(index, holds) == {b" the", b" The"} & tokens_where(index, index.all_kept.reshape(-1))
    holds, _ = specificity.truth(index, text, Rule("domain", "dna"))
    np.testing.assert_array_equal(
        holds, index.all_kept.reshape(-1) & (index.domain_numbers == index.domains.index("dna"))
    )


def test_the_alphabet_proxy_is_the_best_start(index: FeatureIndex, text: Text) -> None:
    _, score = specificity.truth(index, text, Rule("alphabet", "ACGT"))
    counts, n = index.token_counts, index.kept_tokens
    grid = score.reshape(index.all_tokens.shape)

    def gain(token: int) -> float:
        chances = sum(np.log(0.25 if c in "ACGT" else 1e-10) for c in index.token_bytes(token).decode(errors="replace"))
        return chances - float(np.log(counts[token] / n))

    rng = np.random.default_rng(0)
    for context in rng.integers(0, index.n_contexts, 40):
        for position in rng.integers(1, 64, 5):
            ids, kept = index.all_tokens[context, : position + 1], index.all_kept[context, : position + 1]
            if not kept[-1]:
                continue
            start = int(np.max(np.flatnonzero(~kept), initial=-1)) + 1
            best = max(sum(gain(int(t)) for t in ids[j:]) for j in range(start, position + 1))
            assert grid[context, position] == pytest.approx(best, rel=1e-6)


def test_precision_recall_f1_and_pearson(index: FeatureIndex, text: Text) -> None:
    for feature, rule in (
        (DNA, Rule("alphabet", "ACGT")),
        (ARABIC, Rule("script", "Arabic")),
        (KEYWORD, Rule("regex", "def|class")),
    ):
        rows, values = index.firings(feature)
        holds, score = specificity.truth(index, text, rule)
        found = specificity.measure(index, rows, values, holds, score)
        dense = np.zeros(len(holds))
        dense[rows] = values
        keep = index.all_kept.reshape(-1)
        assert found.base == pytest.approx(holds[keep].mean())
        assert found.pearson == pytest.approx(np.corrcoef(dense[keep], score[keep])[0, 1], abs=1e-6)
        for threshold, precision, recall, f1 in found.curve.itertuples(index=False):
            said = dense > threshold
            assert precision == pytest.approx(holds[said].mean())
            assert recall == pytest.approx((holds & said & keep).sum() / (holds & keep).sum())
            assert f1 == pytest.approx(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
        for low, high, firings, share in found.levels.itertuples(index=False):
            inside = (dense > low) & (dense <= high)
            assert firings == inside.sum()
            assert share == pytest.approx(holds[inside].mean() if firings else 0.0)
    assert found.pearson > 0.3  # keywords fire on def and class


def test_rules_that_cannot_be_used_say_why(index: FeatureIndex, text: Text) -> None:
    for rule, message in (
        (Rule("regex", "("), "not a regular expression"),
        (Rule("regex", ""), "1 to 500 characters"),
        (Rule("regex", "a" * 501), "1 to 500 characters"),
        (Rule("script", "Klingon"), "Unknown script"),
        (Rule("tokens", "no-such-token"), "No token of this vocabulary"),
        (Rule("domain", "poems"), "no domain 'poems'"),
        (Rule("alphabet", "z-a"), "not characters"),
    ):
        with pytest.raises(RuleError, match=message):
            specificity.truth(index, text, rule)


def test_a_pattern_that_never_ends_is_stopped(index: FeatureIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specificity, "TIMEOUT_S", 0.05)
    endless = Text("a" * 5000 + "!", np.arange(5002), np.arange(5002))
    with pytest.raises(RuleError, match="longer than"):
        specificity.truth(index, endless, Rule("regex", r"(a+)+b"))
