"""How well `sae search` finds features whose meaning is known, next to plain search for words and a random order.

    python scripts/search_recall.py runs/demo/matryoshka-4096-s0 --json docs/measurements/search.json

For each of the queries below, the features to be found are known from their firings, not from any label: at least 80%
of them are on tokens of a pattern, or in a domain. A feature with fewer than 20 firings is left out.
recall@10 = features to be found among the first ten / min(10, features to be found). Among equals the order counts as
random. The queries are about the domains and tokens of the default text; those with fewer than three features to be
found are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np

from sae.pipeline.search import searchable
from sae.text.embedding import load_text_model
from store.common import write_json
from store.features import FeatureIndex

FIRST = 10
PURE, LEAST_FIRINGS, LEAST_FEATURES = 0.8, 20, 3
DRAWS = 2_000  # of the bootstrap over queries
DOMAINS = {  # query: domain
    "DNA sequences": "dna",
    "genetic code": "dna",
    "base64 encoded data": "base64",
    "encoded binary attachments": "base64",
    "hexadecimal numbers": "hex",
    "memory addresses and hashes": "hex",
    "web addresses": "urls",
    "links to websites": "urls",
    "calendar dates and times": "dates",
    "timestamps": "dates",
    "arithmetic": "arithmetic",
    "calculations with numbers": "arithmetic",
    "source code": "code",
}
TOKENS = {  # query: pattern of the whole token
    "numbers": r"\s*\d+",
    "digits": r"\s*\d+",
    "years": r"\s?(19|20|18)\d\d?",
    "python function definitions": r"\s*(def|class)|\s?lambda",
    "line breaks and indentation": r"\s*\n\s*|\s{2,}",
    "whitespace": r"\s+",
    "opening brackets": r".*[(\[{]",
    "closing brackets": r".*[)\]}]",
    "quotation marks": ".*[\"'“”]",
    "commas": r".*,",
    "end of a sentence": r".*[.?!][\"')]?",
    "question marks": r".*\?",
    "words in capital letters": r"\s?[A-Z]{2,}",
    "pronouns": r"\s?([Ww]e|[Yy]ou|[Tt]hey|[Hh]e|[Ss]he|I|it|It)",
    "articles": r"\s?([Tt]he|[Aa]|[Aa]n)",
    "modal verbs": r"\s?(can|cannot|could|must|may|will|would|should|might)",
    "forms of the verb to be": r"\s?(be|is|are|was|were|been|being|'re)",
    "prepositions": r"\s?(in|In|on|at|of|for|against|between|to|To|with|from|by|into|under|over|during)",
    "boolean values": r"\s?(True|False|None|bool)",
    "import statements": r"\s?(import|from)",
    "comments in code": r"\s*#+",
    "escape sequences with a backslash": r".*\\",
    "function return type annotation": r".*->",
    "method receiver": r"\s?(self|cls)",
    "letters that are not Latin": r".*[^\x00-\u024f\u2000-\u2bff\ufffd].*",
    "punctuation": r"\s?[^\w\s]+",
    "exceptions and errors": r".*(Error|Exception|raise|except|error)",
    "negation": r"\s?(not|never|no|n't|'t|cannot)",
    "conjunctions": r"\s?(and|but|or|But|And|because|though)",
    "underscores": r".*_",
    "slashes in file paths": r".*/",
    "equals sign": r".*=",
}


class Truth(NamedTuple):
    """Which features each query should find [d_sae], and which count at all [d_sae]."""

    wanted: dict[str, np.ndarray]
    counted: np.ndarray


def truth_of(index: FeatureIndex) -> Truth:
    """By the firings of each feature: the share on tokens of the pattern, or in the domain."""
    tokens, domains = index.all_tokens.reshape(-1), index.domain_numbers
    vocabulary = [index.token_bytes(token).decode("utf-8", "replace") for token in range(index.d_vocab)]
    where = {
        query: domains == index.domains.index(domain) for query, domain in DOMAINS.items() if domain in index.domains
    }
    for query, pattern in TOKENS.items():
        matches = np.array([bool(re.fullmatch(pattern, token, re.DOTALL)) for token in vocabulary])
        where[query] = matches[tokens]
    firings = [index.firings(feature)[0] for feature in range(index.d_sae)]
    counted = np.array([len(rows) >= LEAST_FIRINGS for rows in firings])
    shares = {
        query: np.array([inside[rows].mean() if len(rows) else 0.0 for rows in firings])
        for query, inside in where.items()
    }
    wanted = {query: counted & (share >= PURE) for query, share in shares.items()}
    return Truth({query: found for query, found in wanted.items() if found.sum() >= LEAST_FEATURES}, counted)


def recall(scores: np.ndarray, wanted: np.ndarray, counted: np.ndarray) -> float:
    """recall@10 of a ranking by `scores` (nan: not found at all), its mean over the orders of equals."""
    scores, wanted = np.nan_to_num(scores[counted], nan=-np.inf), wanted[counted]
    first = min(FIRST, len(scores))
    last = np.sort(scores)[-first]
    surely, perhaps = scores > last, scores == last
    hits = wanted[surely].sum() + (first - surely.sum()) * wanted[perhaps].mean()
    return float(hits / min(FIRST, wanted.sum()))


def containing(texts: list[str], parts: list[str]) -> np.ndarray:
    """How many of the parts each text contains, whatever their case."""
    return np.array([sum(part.casefold() in text.casefold() for part in parts) for text in texts], float)


def measure(directory: Path, text_model: str | None) -> dict[str, Any]:
    """recall@10 of each way to search: per query, and its mean with a 95% bootstrap interval over queries."""
    index = FeatureIndex.open(directory / "features.zarr")
    model = load_text_model(text_model)
    known = searchable(index, directory, model)
    texts = [f"{own} {text}" for own, text in zip(known.own, known.texts, strict=True)]
    ways: dict[str, Callable[[str], np.ndarray]] = {
        "by meaning": lambda query: known.similarities(model.embed([query], query=True)[0]),
        "number of the query's words in the text": lambda query: containing(texts, query.split()),
        "the whole query in the text": lambda query: containing(texts, [query]),
        "random order (control)": lambda query: np.zeros(index.d_sae),
    }
    truth = truth_of(index)
    queries = {
        query: {"features": int(wanted.sum())}
        | {way: recall(scores(query), wanted, truth.counted) for way, scores in ways.items()}
        for query, wanted in truth.wanted.items()
    }
    means = {way: _mean([found[way] for found in queries.values()]) for way in ways}
    counts = {"features": int(truth.counted.sum()), "queries": len(queries)}
    return {"text_model": model.id, **counts, "recall_at_10": means, "by_query": queries}


def _mean(values: list[float]) -> dict[str, Any]:
    drawn = np.random.default_rng(0).choice(values, (DRAWS, len(values))).mean(1)
    return {"value": float(np.mean(values)), "ci95": np.quantile(drawn, [0.025, 0.975]).tolist()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", type=Path, metavar="DICTIONARY", help="directory of an indexed dictionary")
    parser.add_argument("--text-model", metavar="DIR", help="directory of another sentence-transformers model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    found = measure(args.sae, args.text_model)
    for query, each in found["by_query"].items():
        print(f"{query:36} {each['features']:5}  " + "  ".join(f"{value:.2f}" for value in list(each.values())[1:]))
    for way, each in found["recall_at_10"].items():
        print(f"{each['value']:.3f}  [{each['ci95'][0]:.3f}, {each['ci95'][1]:.3f}]  {way}")
    if args.json:
        write_json(args.json, {"hardware": machine.hardware(), **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
