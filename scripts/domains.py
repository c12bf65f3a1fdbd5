"""Finds the best feature for each domain of text: its precision, recall, and correlation with the paper's proxy.

    python scripts/domains.py runs/mine/topk-4096-s0 --svg domains.svg

The feature is chosen on training contexts and every figure is taken on held-out contexts. Kept tokens only. The picture
has a panel for each domain with a proxy: of the tokens on which the feature exceeds a share of its largest activation,
how many are in the domain (specificity), and how many of the domain's tokens they are (sensitivity).
Source of the proxies: Bricken et al. 2023, "Detailed investigations": log P(s | context) / P(s), the largest over the
strings s of whole tokens that end at a token; P(s) is the product of unigram probabilities.
"""

from __future__ import annotations

import argparse
import string
import sys
from pathlib import Path

import numpy as np
from panels import Line, Panel, drawing

from sae.evaluation.domains import DomainCounts, f1
from store.features import FeatureIndex

SCRIPT_BLOCKS = {"arabic": ((0x0600, 0x06FF), (0x0750, 0x077F)), "hebrew": ((0x0590, 0x05FF),)}
ALPHABETS = {"base64": string.ascii_letters + string.digits + "+/", "hex": string.hexdigits}
# The paper's text writes nucleotides in capitals; databases also write them small, never both in one sequence.
NUCLEOTIDES = ("ATCG", "atcg")
OUTSIDE = 1e-10
THRESHOLDS = [i / 20 for i in range(21)]


def log_ratio_of_alphabet(vocabulary: list[bytes], unigram: np.ndarray, alphabet: str) -> np.ndarray:
    """log P(token | alphabet) − log P(token): characters are uniform inside the alphabet and 1e-10 outside."""
    inside = set(alphabet.encode())
    log_p = np.array(
        [sum(np.log(1 / len(alphabet) if byte in inside else OUTSIDE) for byte in token) for token in vocabulary]
    )
    return log_p - np.log(np.maximum(unigram, 1e-12))


def best_ending_here(ratio: np.ndarray) -> np.ndarray:
    """The largest sum over runs of tokens that end at each position [contexts, pos]."""
    best = np.empty_like(ratio)
    best[:, 0] = ratio[:, 0]
    for position in range(1, ratio.shape[1]):
        best[:, position] = ratio[:, position] + np.maximum(0, best[:, position - 1])
    return best


def in_script(tokens: np.ndarray, vocabulary: list[bytes], blocks: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Positions of which all characters (or parts of characters) are inside the Unicode blocks."""
    result = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(tokens):
        pieces = [vocabulary[i] for i in ids]
        text = b"".join(pieces).decode("utf-8", errors="surrogateescape")
        belongs: list[bool] = []  # one entry per byte
        for character in text:
            code = ord(character)
            width = 1 if 0xDC80 <= code <= 0xDCFF else len(character.encode())
            belongs += [any(low <= code <= high for low, high in blocks)] * width
        start = 0
        for position, piece in enumerate(pieces):
            here = belongs[start : start + len(piece)]
            result[row, position] = bool(here) and all(here)
            start += len(piece)
    return result


def script_proxy(tokens: np.ndarray, keep: np.ndarray, belongs: np.ndarray, d_vocab: int) -> np.ndarray:
    """log P(script | token) − log P(script), where P(script | token) is the share of the token's uses in the script."""
    seen = np.bincount(tokens[keep], minlength=d_vocab)
    inside = np.bincount(tokens[keep & belongs], minlength=d_vocab)
    share = np.maximum(inside / np.maximum(seen, 1), OUTSIDE)
    return np.maximum(0, np.log(share) - np.log(max(belongs[keep].mean(), OUTSIDE)))[tokens]


def proxy(domain: str, tokens: np.ndarray, keep: np.ndarray, vocabulary: list[bytes]) -> np.ndarray | None:
    """The paper's proxy at each position; None for a domain that has none."""
    if domain in SCRIPT_BLOCKS:
        belongs = in_script(tokens, vocabulary, SCRIPT_BLOCKS[domain])
        return script_proxy(tokens, keep, belongs, len(vocabulary))
    unigram = np.bincount(tokens[keep], minlength=len(vocabulary)) / keep.sum()
    if domain in ALPHABETS:
        return best_ending_here(log_ratio_of_alphabet(vocabulary, unigram, ALPHABETS[domain])[tokens])
    if domain == "dna":
        return np.maximum(*(nucleotides(tokens, vocabulary, unigram, alphabet) for alphabet in NUCLEOTIDES))
    return None


def nucleotides(tokens: np.ndarray, vocabulary: list[bytes], unigram: np.ndarray, alphabet: str) -> np.ndarray:
    """1 where two tokens or more that end here are likelier under the alphabet, as in the paper; else 0."""
    ratio = log_ratio_of_alphabet(vocabulary, unigram, alphabet)[tokens]
    pair = ratio[:, 1:] + best_ending_here(ratio)[:, :-1]
    return np.pad((pair > 0).astype(float), ((0, 0), (1, 0)))


class DomainTable:
    """Every feature's firings by domain: features are chosen on one part of an index and judged on another."""

    def __init__(self, index: FeatureIndex) -> None:
        self.index = index
        self.tokens = index.column("tokens").astype(np.int64)
        self.keep = index.column("keep")
        self.vocabulary = [index.token_bytes(t) for t in range(index.d_vocab)]
        domain_of = [index.domains.index(entry[2]) for entry in index.documents]
        self.domain = np.append(domain_of, -1)[index.column("document")]
        self.heldout = np.zeros(self.keep.shape, bool)
        self.heldout[: index.attributes["heldout_contexts"]] = True

    def counts(self, part: np.ndarray) -> DomainCounts:
        """Firings and kept tokens by domain in a part of the positions."""
        flat_domain, flat_part = self.domain.reshape(-1), part.reshape(-1)
        table = np.zeros((self.index.d_sae, len(self.index.domains)), np.int64)
        for feature in range(self.index.d_sae):
            rows, _ = self.index.firings(feature)
            rows = rows[flat_part[rows]]
            table[feature] = np.bincount(flat_domain[rows], minlength=table.shape[1])
        counted = flat_domain[(part & self.keep).reshape(-1)]
        return DomainCounts(table, np.bincount(counted, minlength=table.shape[1]))

    def pearson(self, feature: int, values: np.ndarray, part: np.ndarray) -> float:
        acts = np.zeros(self.keep.size)
        rows, fired = self.index.firings(feature)
        acts[rows] = fired
        chosen = (part & self.keep).reshape(-1)
        return float(np.corrcoef(acts[chosen], values.reshape(-1)[chosen])[0, 1])

    def panel(self, domain: int, feature: int, part: np.ndarray) -> Panel:
        """Specificity and sensitivity of a feature to a domain over thresholds, as shares of its largest activation."""
        counted, inside = (part & self.keep).reshape(-1), self.domain.reshape(-1) == domain
        rows, acts = self.index.firings(feature)
        rows, acts = rows[counted[rows]], acts[counted[rows]] / acts[counted[rows]].max()
        n_domain = int((counted & inside).sum())
        found = [inside[rows[acts >= share]] for share in THRESHOLDS]
        specific = Line("specificity", [(at, float(hit.mean())) for at, hit in zip(THRESHOLDS, found, strict=True)])
        sensitive = Line("sensitivity", [(at, hit.sum() / n_domain) for at, hit in zip(THRESHOLDS, found, strict=True)])
        base = n_domain / counted.sum()
        anything = Line("share of all text", [(at, float(base)) for at in THRESHOLDS], control=True)
        title = f"{self.index.domains[domain]}: feature {feature}"
        return Panel(title, "at least this share of its largest activation", [specific, sensitive, anything])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", type=Path, help="directory of an indexed dictionary")
    parser.add_argument("--svg", type=Path, help="draw specificity and sensitivity to the domains with a proxy")
    args = parser.parse_args()
    table = DomainTable(FeatureIndex.open(args.sae / "features.zarr"))
    best = f1(*table.counts(~table.heldout).precision_recall()).argmax(0)
    heldout = table.counts(table.heldout)
    precision, recall = heldout.precision_recall()
    print(f"{'domain':16} {'tokens':>8} {'feature':>8} {'precision':>9} {'recall':>7} {'F1':>6} {'proxy r':>8}")
    panels = []
    for number, domain in enumerate(table.index.domains):
        if heldout.tokens[number] < 200:
            continue
        feature = int(best[number])
        p, r, tokens = precision[feature, number], recall[feature, number], heldout.tokens[number]
        values = proxy(domain, table.tokens, table.keep, table.vocabulary)
        pearson = ""
        if values is not None:
            pearson = f"{table.pearson(feature, values, table.heldout):8.2f}"
            if heldout.fired[feature].any():
                panels.append(table.panel(number, feature, table.heldout))
        print(f"{domain:16} {tokens:8,} {feature:8} {p:9.2f} {r:7.2f} {f1(p, r):6.2f} {pearson}")
    if args.svg and not panels:
        print("no picture: no domain of this text has a proxy and a feature that fires on held-out text")
    elif args.svg:
        args.svg.write_text(drawing(panels), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
