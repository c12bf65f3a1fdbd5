"""A label for each feature without a language model: the short rule that best predicts where it fires; numpy only.

Rules are learned on the even contexts of the index and scored on the odd contexts, which they have not seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer

from sae.evaluation.domains import f1
from sae.indexing.firings import Firings, rows_of, systematic_sample
from sae.jobs.progress import progress

KINDS = ("token", "after", "pair", "domain")  # this token; the previous token; both; the document's domain
MAX_KEYS = 6
MAX_FIRINGS = 20_000  # of one feature, in each half
SIMPLER_BY = 0.05  # a later kind must beat an earlier kind by this much F1


class Kind(NamedTuple):
    """One kind of rule: the key (such as the token) that it sees at each row, and how often each key occurs.

    `key_of[r]` is the key at row r (-1: none), `tokens[key]` the two numbers that name it. `occurrences[half][key]`
    counts it in the even (half 0) and the odd contexts (half 1).
    """

    key_of: Int[np.ndarray, " rows"]
    tokens: Int[np.ndarray, "keys 2"]
    occurrences: tuple[Int[np.ndarray, " keys"], Int[np.ndarray, " keys"]]


class Rule(NamedTuple):
    """The rule holds where the kind sees one of `keys`; the scores are of the half it was not learned on."""

    kind: int
    keys: Int[np.ndarray, " keys"]
    precision: float
    recall: float
    f1: float


def panels(firings: Firings, *, seed: int = 0) -> dict[str, np.ndarray]:
    """The rule of each feature and its held-out scores.

    `label/kind` [d_sae]: number in KINDS (-1: none). `label/keys` [d_sae, MAX_KEYS, 2]: the previous token and the
    token, or the domain's number and -1 (-1: unused). `label/score` [d_sae, 3]: held-out precision, recall, F1.
    """
    d_sae, seq_len = len(firings.ptr) - 1, firings.tokens.shape[1]
    kinds = kinds_of_rule(firings.tokens, firings.keep, firings.domain)
    kind, keys = np.full(d_sae, -1, np.int8), np.full((d_sae, MAX_KEYS, 2), -1, np.int32)
    score = np.zeros((d_sae, 3), np.float32)
    rng = np.random.default_rng(seed)
    with progress("labels", d_sae, "features") as bar:
        for f in range(d_sae):
            rule = best_rule(rows_of(firings, f), kinds, seq_len, rng)
            if rule is not None:
                kind[f], score[f] = rule.kind, (rule.precision, rule.recall, rule.f1)
                keys[f, : len(rule.keys)] = kinds[rule.kind].tokens[rule.keys]
            bar.update(1)
    return {"label/kind": kind, "label/keys": keys, "label/score": score}


def best_rule(
    rows: Int[np.ndarray, " firings"], kinds: list[Kind], seq_len: int, rng: np.random.Generator
) -> Rule | None:
    """The rule with the best F1 on the even contexts, scored on the odd ones; None without firings in both halves."""
    halves = [rows[(rows // seq_len) % 2 == half] for half in (0, 1)]
    if not all(len(half) for half in halves):
        return None
    even, odd = (half[systematic_sample(len(half), MAX_FIRINGS, rng)] for half in halves)
    best: tuple[float, int, np.ndarray] | None = None
    for number, kind in enumerate(kinds):
        learned, score = _learn(kind.key_of[even], kind.occurrences[0], len(halves[0]))
        if len(learned) and (best is None or score > best[0] + SIMPLER_BY):
            best = score, number, learned
    if best is None:
        return None
    _, number, learned = best
    hits = np.isin(kinds[number].key_of[odd], learned).mean() * len(halves[1])
    true_at = kinds[number].occurrences[1][learned].sum()
    precision, recall = float(hits / true_at if true_at else 0.0), float(hits / len(halves[1]))
    return Rule(number, learned, min(1.0, precision), recall, min(1.0, float(f1(precision, recall))))


def _learn(
    keys: Int[np.ndarray, " firings"], occurrences: Int[np.ndarray, " keys"], n_firings: int
) -> tuple[Int[np.ndarray, " learned"], float]:
    """At most MAX_KEYS keys with the best F1 = 2 hits / (firings + rows where the rule holds), and that F1.

    Keys are added in order of precision: for any number of keys the most precise ones give the best F1.
    """
    keys = keys[keys >= 0]
    if not len(keys):
        return keys, 0.0
    ids, count = np.unique(keys, return_counts=True)
    hits = np.minimum(count * (n_firings / len(keys)), occurrences[ids])
    # Only among the keys with the most hits: a key seen once, with precision 1, explains little.
    frequent = np.argsort(-hits, kind="stable")[: 4 * MAX_KEYS]
    ids, hits = ids[frequent], hits[frequent]
    by_precision = np.argsort(-hits / occurrences[ids], kind="stable")
    ids, hits = ids[by_precision], hits[by_precision]
    scores = 2 * hits.cumsum() / (n_firings + occurrences[ids].cumsum())
    last = int(np.argmax(scores[:MAX_KEYS]))
    return ids[: last + 1], float(scores[last])


def kinds_of_rule(
    tokens: Integer[np.ndarray, "contexts seq_len"],
    keep: Bool[np.ndarray, "contexts seq_len"],
    domain: Integer[np.ndarray, "contexts seq_len"],
) -> list[Kind]:
    """The four kinds of rule over a text, in the order of KINDS."""
    tokens = tokens.astype(np.int64)
    n_tokens = int(tokens.max(initial=0)) + 1
    previous = np.full_like(tokens, -1)
    previous[:, 1:] = np.where(keep[:, :-1], tokens[:, :-1], -1)
    pair = np.where(previous >= 0, previous * n_tokens + tokens, -1)
    pairs_seen, pair_key = np.unique(pair, return_inverse=True)
    pair_key = np.where(pair.reshape(-1) >= 0, pair_key.reshape(-1), -1).reshape(pair.shape)
    every_token, every_domain = np.arange(n_tokens), np.arange(int(domain.max(initial=0)) + 1)
    keys_and_names = [
        (tokens, _names(None, every_token)),
        (previous, _names(every_token, None)),
        (pair_key, _names(pairs_seen // n_tokens, pairs_seen % n_tokens)),
        (domain, _names(every_domain, None)),
    ]
    return [_kind(np.where(keep, key, -1).astype(np.int32), names) for key, names in keys_and_names]


def _names(first: np.ndarray | None, second: np.ndarray | None) -> Int[np.ndarray, "keys 2"]:
    """Two columns of numbers; an unused one holds -1."""
    columns = [column for column in (first, second) if column is not None]
    unused = np.full_like(columns[0], -1)
    return np.stack([unused if column is None else column for column in (first, second)], 1).astype(np.int32)


def _kind(key_of: Int[np.ndarray, "contexts seq_len"], names: Int[np.ndarray, "keys 2"]) -> Kind:
    even, odd = (np.bincount(part[part >= 0], minlength=len(names)) for part in (key_of[0::2], key_of[1::2]))
    return Kind(key_of.reshape(-1), names, (even, odd))
