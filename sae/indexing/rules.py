"""A label for each feature without a language model: the short rule that tells best where it fires; numpy only.

Rules are learned on the even contexts of the index and scored on the odd ones, which they have not seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sae.indexing.co_activation import Firings, evenly
from sae.jobs.progress import progress

KINDS = ("token", "after", "pair", "domain")  # this token; the one before; both; the document's domain
MAX_KEYS = 6
MAX_FIRINGS = 20_000  # of one feature, per half
SIMPLER_BY = 0.05  # a later kind must beat an earlier one by this much F1


class Half(NamedTuple):
    """One half of the contexts: how often each key occurs in it."""

    occurrences: np.ndarray


class Kind(NamedTuple):
    """`key_of[r]` is what the rule sees at row r (-1: nothing); `tokens[key]` are the two numbers that name a key."""

    key_of: np.ndarray
    tokens: np.ndarray
    halves: tuple[Half, Half]


class Rule(NamedTuple):
    """`keys` make the rule true; the scores are of the half they were not learned on."""

    kind: int
    keys: np.ndarray
    precision: float
    recall: float
    f1: float


def panels(firings: Firings, *, seed: int = 0) -> dict[str, np.ndarray]:
    """`label/kind` [d_sae] (number in KINDS, -1: none), `label/keys` [d_sae, MAX_KEYS, 2] (the token before and the
    token; in kind `domain` the domain's number; -1: unused), `label/score` [d_sae, 3] (held-out precision, recall, F1).
    """
    d_sae, seq_len = len(firings.ptr) - 1, firings.tokens.shape[1]
    kinds = _kinds(firings)
    kind, keys = np.full(d_sae, -1, np.int8), np.full((d_sae, MAX_KEYS, 2), -1, np.int32)
    score = np.zeros((d_sae, 3), np.float32)
    rng = np.random.default_rng(seed)
    with progress("labels", d_sae, "features") as bar:
        for f in range(d_sae):
            rows = np.asarray(firings.rows[int(firings.ptr[f]) : int(firings.ptr[f + 1])]).astype(np.int64)
            rule = best_rule(rows, kinds, seq_len, rng)
            if rule is not None:
                kind[f], score[f] = rule.kind, (rule.precision, rule.recall, rule.f1)
                keys[f, : len(rule.keys)] = kinds[rule.kind].tokens[rule.keys]
            bar.update(1)
    return {"label/kind": kind, "label/keys": keys, "label/score": score}


def best_rule(rows: np.ndarray, kinds: list[Kind], seq_len: int, rng: np.random.Generator) -> Rule | None:
    """The kind with the best F1 on the even contexts, scored on the odd ones; None without firings in both."""
    halves = [rows[(rows // seq_len) % 2 == half] for half in (0, 1)]
    if not all(len(half) for half in halves):
        return None
    drawn = [half[evenly(len(half), MAX_FIRINGS, rng)] for half in halves]
    best: tuple[float, int, np.ndarray] | None = None
    for number, kind in enumerate(kinds):
        learned, f1 = _learn(kind.key_of[drawn[0]], kind.halves[0].occurrences, len(halves[0]))
        if len(learned) and (best is None or f1 > best[0] + SIMPLER_BY):
            best = f1, number, learned
    if best is None:
        return None
    _, number, learned = best
    hits = np.isin(kinds[number].key_of[drawn[1]], learned).mean() * len(halves[1])
    said = kinds[number].halves[1].occurrences[learned].sum()
    precision, recall = hits / said if said else 0.0, hits / len(halves[1])
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return Rule(number, learned, min(1.0, float(precision)), float(recall), float(min(1.0, f1)))


def _learn(keys: np.ndarray, occurrences: np.ndarray, n_firings: int) -> tuple[np.ndarray, float]:
    """The at most MAX_KEYS keys with the best F1 = 2 hits / (firings + times the rule is true), and that F1.

    Keys are taken in order of precision, which is the best order for any number of them.
    """
    keys = keys[keys >= 0]
    if not len(keys):
        return keys, 0.0
    ids, count = np.unique(keys, return_counts=True)
    hits = np.minimum(count * (n_firings / len(keys)), occurrences[ids])
    # among the keys that fire most: a key seen once with precision 1 explains little
    often = np.argsort(-hits, kind="stable")[: 4 * MAX_KEYS]
    ids, hits = ids[often], hits[often]
    order = np.argsort(-hits / occurrences[ids], kind="stable")
    ids, hits = ids[order], hits[order]
    f1 = 2 * hits.cumsum() / (n_firings + occurrences[ids].cumsum())
    most = int(np.argmax(f1[:MAX_KEYS]))
    return ids[: most + 1], float(f1[most])


def _kinds(firings: Firings) -> list[Kind]:
    tokens = firings.tokens.astype(np.int64)
    keep, n_tokens = firings.keep, int(tokens.max(initial=0)) + 1
    before = np.full_like(tokens, -1)
    before[:, 1:] = np.where(keep[:, :-1], tokens[:, :-1], -1)
    pair = np.where(before >= 0, before * n_tokens + tokens, -1)
    seen, pair_key = np.unique(pair, return_inverse=True)
    pair_key = np.where(pair.reshape(-1) >= 0, pair_key.reshape(-1), -1).reshape(pair.shape)
    one = np.arange(n_tokens)
    domains = np.arange(int(firings.domain.max(initial=0)) + 1)
    none = np.full_like
    named = [
        (tokens, np.stack([none(one, -1), one], 1)),
        (before, np.stack([one, none(one, -1)], 1)),
        (pair_key, np.stack([seen // n_tokens, seen % n_tokens], 1)),
        (firings.domain, np.stack([domains, none(domains, -1)], 1)),
    ]
    return [_kind(np.where(keep, key, -1).astype(np.int32), names) for key, names in named]


def _kind(key_of: np.ndarray, names: np.ndarray) -> Kind:
    even, odd = (Half(np.bincount(part[part >= 0], minlength=len(names))) for part in (key_of[0::2], key_of[1::2]))
    return Kind(key_of.reshape(-1), names.astype(np.int32), (even, odd))
