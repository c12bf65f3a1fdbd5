"""How well a rule describes a feature: the rule's share by activation, precision and recall, correlation with the proxy
of Bricken et al. 2023. A rule is a regular expression, script, alphabet, set of tokens or domain; no Streamlit here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import regex

from browser.data import N_INTERVALS
from store.features import FeatureIndex

KINDS = ("regex", "script", "alphabet", "tokens", "domain")
SCRIPTS = (
    "Arabic",
    "Armenian",
    "Bengali",
    "Cyrillic",
    "Devanagari",
    "Georgian",
    "Greek",
    "Han",
    "Hangul",
    "Hebrew",
    "Hiragana",
    "Katakana",
    "Latin",
    "Thai",
)
MAX_PATTERN = 500  # characters
TIMEOUT_S = 5.0
OTHER = 1e-10  # probability of a character outside the alphabet in Bricken et al. 2023


class RuleError(ValueError):
    """An invalid rule; the message says why."""


@dataclass(frozen=True)
class Rule:
    """`text` is the pattern, the script's name, the characters (`ACGT`, `a-z0-9+/`), the tokens or the domain."""

    kind: str
    text: str


@dataclass(frozen=True)
class Text:
    """The text of an index as one string, and the byte at which each token begins [n_rows + 1]."""

    string: str
    byte_of_character: np.ndarray
    token_starts: np.ndarray


@dataclass(frozen=True)
class Specificity:
    """`levels`: low, high, firings, share of them on which the rule holds. `curve`: threshold, precision, recall, f1.

    `base`: share of all kept tokens on which the rule holds. `pearson`: correlation of activation and proxy over them.
    """

    levels: pd.DataFrame
    curve: pd.DataFrame
    base: float
    pearson: float


def read_text(index: FeatureIndex) -> Text:
    """The bytes of all tokens, joined; BOS and padding become NUL, so that no match runs across them."""
    vocabulary = [index.token_bytes(i) for i in range(index.d_vocab)]
    tokens, keep = index.all_tokens.reshape(-1), index.all_kept.reshape(-1)
    parts = [vocabulary[t] if k else b"\0" for t, k in zip(tokens.tolist(), keep.tolist(), strict=True)]
    string = b"".join(parts).decode("utf-8", "surrogateescape")
    code = np.frombuffer(string.encode("utf-32-le", "surrogatepass"), np.uint32)
    escaped = (code >= 0xDC80) & (code <= 0xDCFF)  # one byte of an invalid character
    width = np.where(escaped, 1, 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000))
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    return Text(string, np.concatenate([[0], np.cumsum(width)]), np.concatenate([[0], np.cumsum(lengths)]))


def truth(index: FeatureIndex, text: Text, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """(where the rule holds [n_rows], score of the proxy [n_rows]).

    The proxy is log P(s | rule) / P(s) of the text s that ends at the token (Bricken et al. 2023). For an alphabet of n
    characters, P(c | rule) = 1/n (1e-10 for others), with the start that gives the largest score; the rule holds where
    the score is positive. For other rules, Bayes gives 1 / P(rule) where the rule holds and 1e-10 / P(rule) elsewhere.
    Raises: RuleError for an invalid rule, or one that takes longer than TIMEOUT_S.
    """
    if not rule.text or len(rule.text) > MAX_PATTERN:
        raise RuleError(f"A rule must have 1 to {MAX_PATTERN} characters; this one has {len(rule.text)}.")
    if rule.kind == "alphabet":
        score = _alphabet_proxy(index, rule.text)
        return score > 0, score
    holds = _holds(index, text, rule) & index.all_kept.reshape(-1)
    share = max(float(holds.sum()) / max(1, index.kept_tokens), 1e-12)
    return holds, np.where(holds, -np.log(share), np.log(OTHER) - np.log(share))


def measure(
    index: FeatureIndex, rows: np.ndarray, values: np.ndarray, holds: np.ndarray, score: np.ndarray
) -> Specificity:
    """Compares the feature that fires on `rows` with `values` to a rule (`holds` and `score` from `truth`)."""
    keep = index.all_kept.reshape(-1)
    n, n_true = int(keep.sum()), int((holds & keep).sum())
    on = holds[rows]
    edges = np.linspace(0.0, float(values.max()), N_INTERVALS + 1)
    place = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, N_INTERVALS - 1)
    count = np.bincount(place, minlength=N_INTERVALS)
    true = np.bincount(place, on, minlength=N_INTERVALS)
    levels = pd.DataFrame(
        {"low": edges[:-1], "high": edges[1:], "firings": count, "share": true / np.maximum(count, 1)}
    )
    order = np.argsort(-values, kind="stable")
    hits, said = np.cumsum(on[order]), np.arange(1, len(order) + 1)
    thresholds = np.linspace(0.0, float(values.max()), 60, endpoint=False)
    last = np.searchsorted(-values[order], -thresholds, side="left") - 1  # the last firing above each threshold
    precision, recall = hits[last] / said[last], hits[last] / max(1, n_true)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    curve = pd.DataFrame({"threshold": thresholds, "precision": precision, "recall": recall, "f1": f1})
    s = score[keep]
    covariance = float(values.astype(np.float64) @ score[rows]) / n - values.sum(dtype=np.float64) / n * s.mean()
    variance = (values.astype(np.float64) ** 2).sum() / n - (values.sum(dtype=np.float64) / n) ** 2
    spread = float(np.sqrt(max(0.0, variance)) * s.std())
    return Specificity(levels, curve, n_true / max(1, n), covariance / spread if spread > 0 else float("nan"))


def _holds(index: FeatureIndex, text: Text, rule: Rule) -> np.ndarray:
    if rule.kind == "domain":
        if rule.text not in index.domains:
            raise RuleError(f"There is no domain {rule.text!r}; this index has {', '.join(index.domains)}.")
        inside: np.ndarray = index.domain_numbers == index.domains.index(rule.text)
        return inside
    if rule.kind == "tokens":
        wanted = set(rule.text.replace("␣", " ").replace("↵", "\n").replace("⇥", "\t").split(","))
        member: np.ndarray = np.array(
            [index.token_bytes(i).decode(errors="replace") in wanted for i in range(index.d_vocab)]
        )
        if not member.any():
            raise RuleError(
                "No token of this vocabulary is in that set. Write ␣ for spaces, and commas between tokens."
            )
        return np.take(member, index.all_tokens.reshape(-1))
    if rule.kind == "script" and rule.text not in SCRIPTS:
        raise RuleError(f"Unknown script {rule.text!r}.")
    return _matched(text, rf"\p{{Script={rule.text}}}+" if rule.kind == "script" else rule.text)


def _matched(text: Text, pattern: str) -> np.ndarray:
    """Rows with at least one byte of a match."""
    try:
        spans = [
            m.span() for m in regex.compile(pattern).finditer(text.string, timeout=TIMEOUT_S) if m.end() > m.start()
        ]
    except regex.error as error:
        raise RuleError(f"This is not a regular expression: {error}.") from error
    except TimeoutError as error:
        raise RuleError(f"The pattern took longer than {TIMEOUT_S:g} s; simplify it.") from error
    marks = np.zeros(len(text.token_starts), np.int64)
    if spans:
        bounds = text.byte_of_character[np.array(spans)]
        np.add.at(marks, np.searchsorted(text.token_starts, bounds[:, 0], side="right") - 1, 1)
        np.add.at(marks, np.searchsorted(text.token_starts, bounds[:, 1], side="left"), -1)
    return np.cumsum(marks)[:-1] > 0


def _alphabet_proxy(index: FeatureIndex, characters: str) -> np.ndarray:
    """max over starts j of Σ_{i=j..t} log P(x_i | alphabet) − log P(x_i) at each row t, within its context."""
    try:
        inside = regex.compile(f"[{characters}]")
        size = sum(bool(inside.match(chr(c))) for c in range(0x3000))
    except regex.error as error:
        raise RuleError(f"These are not characters: {error}. Write them as in ACGT or a-zA-Z0-9+/.") from error
    if not size:
        raise RuleError("This alphabet has no characters.")
    chances = np.log([1.0 / size, OTHER])
    gain = np.zeros(index.d_vocab)
    for i in range(index.d_vocab):
        decoded = index.token_bytes(i).decode("utf-8", "surrogateescape")
        gain[i] = sum(chances[0] if inside.match(c) else chances[1] for c in decoded)
    gain -= np.log(np.maximum(index.token_counts, 0.5) / max(1, index.kept_tokens))
    steps = np.where(index.all_kept, gain[index.all_tokens], -np.inf)
    score = np.empty(steps.shape)
    running = np.full(len(steps), -np.inf)
    for position in range(steps.shape[1]):
        running = steps[:, position] + np.maximum(running, 0.0)
        score[:, position] = running
    return np.where(np.isfinite(score), score, 0.0).reshape(-1)
