"""Each feature as a short English text, from what its index holds; the search by meaning compares these texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import numpy as np

from store.features import FeatureIndex

N_TOKENS = 5
PURE = 0.5  # a domain with at least this share of the firings is named
UNNAMED_TOKENS = ("positions", "nothing")  # rows of arrays: a token id stands for no text
_SPACES = {"\n": "line break", "\t": "tab", " ": "space", "\r": "line break"}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # of bytes that are no character


def feature_texts(index: FeatureIndex) -> list[str]:
    """For each feature the domain of most of its firings and the tokens that it fires on most often, in words.

    "" for a feature that never fires. Characters other than Latin letters are named as in Unicode, so that "(" is found
    as a left parenthesis and Arabic text by its script.
    """
    named = (index.rows or {}).get("tokens") not in UNNAMED_TOKENS
    usual = _usual_tokens(index) if named else [[] for _ in range(index.d_sae)]
    domains = [""] * index.d_sae if index.sampled else _domains(index)
    return [
        ". ".join(filter(None, (domain, tokens_in_words(map(index.token_bytes, ids)))))
        for domain, ids in zip(domains, usual, strict=True)
    ]


def _domains(index: FeatureIndex) -> list[str]:
    of, purity, count = (index.stats[name].tolist() for name in ("domain_top", "domain_purity", "count"))
    return [
        index.domains[domain] if n and domain >= 0 and share >= PURE else ""
        for domain, share, n in zip(of, purity, count, strict=True)
    ]


def _usual_tokens(index: FeatureIndex) -> list[list[int]]:
    """The tokens that each feature fires on most often, at most `N_TOKENS` (ties: lower id)."""
    feature = index.column("by_token/feature").astype(np.int64)
    count = index.column("by_token/count").astype(np.int64)
    pointers = index.column("by_token/ptr").astype(np.int64)
    token = np.repeat(np.arange(index.d_vocab), pointers[1:] - pointers[:-1])
    order = np.lexsort((token, -count, feature))
    bounds = np.searchsorted(feature[order], np.arange(index.d_sae + 1)).tolist()
    pairs = zip(bounds[:-1], bounds[1:], strict=True)
    return [token[order[low : min(high, low + N_TOKENS)]].tolist() for low, high in pairs]


def tokens_in_words(tokens: Iterable[bytes]) -> str:
    """Tokens as "fires on def; ( left parenthesis; line break"; "" for none."""
    found = list(dict.fromkeys(in_words(token) for token in tokens))
    return f"fires on {'; '.join(found)}" if found else ""


def in_words(token: bytes) -> str:
    """A token with the kinds of its characters that are not Latin letters: "(self left parenthesis"."""
    text = token.decode("utf-8", "replace")
    written = text.strip()
    if not written:
        return _SPACES.get(text[:1], "space") if len(set(text)) < 2 else "line break and indentation"
    shown = "".join(each for each in written if each.isprintable() and each != REPLACEMENT)
    return " ".join(filter(None, [shown, *dict.fromkeys(map(_kind, written))]))


def _kind(character: str) -> str:
    """The script of a letter, "number" of a digit, the name of anything else; "" for a Latin letter."""
    if character == REPLACEMENT:
        return "part of a character"
    name = unicodedata.name(character, "").lower()
    if character.isalpha():
        return "" if name.startswith("latin") else name.split(" ")[0]
    return "number" if character.isdecimal() else name
