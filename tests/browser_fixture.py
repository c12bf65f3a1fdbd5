"""A small dictionary with known features over made-up text, for the browser's tests.

There is no model: feature f fires where its rule matches a token, more strongly the more often the rule matched just
before. So the expected content of every panel is known.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sae.indexing import co_activation, rules
from store.features import FeatureWriter

SEQ_LEN = 64
DEAD, DENSE, DNA, ARABIC, HOSTILE, PARTIAL, KEYWORD = 7, 8, 0, 1, 2, 3, 4

PROSE = [
    "The lighthouse keeper counted the ships that passed before the fog came in.",
    "She folded the map twice, and the coast of the island disappeared from view.",
    "Bread rises slowly in a cold kitchen, but the crust is better for the wait.",
    "In the morning the river was higher, and the bridge had to be closed again.",
    "He wrote that the theorem was true, although nobody had yet found a proof.",
    "The orchestra tuned while the late guests looked for the seats they had bought.",
    "“Nothing is simpler,” said the engineer, “than a machine one has already built.”",
    "Rain fell on the vineyard for nine days; on the tenth, the harvest began.",
]
CODE = [
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
    "class Stack:\n\tdef __init__(self):\n\t\tself.items = []\n",
    'for name in sorted(names):\n    if name is not None:\n        print(f"{name}: {len(name)}")\n',
    "try:\n    import numpy as np\nexcept ImportError:\n    np = None\n",
    "while lo < hi:\n    mid = (lo + hi) // 2\n    if a[mid] < x:\n        lo = mid + 1\n",
]
ARABIC_TEXT = [
    "ذهب الولد إلى السوق واشترى الخبز والتمر",
    "كانت المدينة هادئة في الصباح الباكر",
    "يقرأ الطالب كتابا عن تاريخ العلوم",
]
EMOJI = ["fair winds ⛵ and a café crème ☕ for 3 €", "naïve façade, 東京 at night 🌃🌃"]
# Token text that breaks pages which trust it
HOSTILE_TOKENS = [
    "<script>window.__x=1</script>",
    '<img src=x onerror="window.__x=1">',
    "<style>body{display:none}</style>",
    "</script>",
    "$x^2$",
    ":red[hi]",
    "**bold**",
    "`code`",
    "# H",
    "&amp;",
    "[link](http://example.org/pixel.png)",
    "![i](http://example.org/pixel.png)",
    "\n\n# Heading",
    "\u202eevil",
    "{{7*7}}",
    "' onmouseover='window.__x=1",
]
BYTE_TOKENS = [bytes([i]) for i in range(256)]
WORD = re.compile(r" ?[A-Za-z_]+| ?\d| ?[^\sA-Za-z\d]+|\s+")


def _documents(rng: np.random.Generator, n: int) -> list[tuple[str, list[str]]]:
    """(domain, pieces of text) of `n` documents in a fixed rotation of domains."""
    made: list[tuple[str, list[str]]] = []
    for i in range(n):
        kind = ("prose", "code", "dna", "prose", "arabic", "hostile", "code", "emoji")[i % 8]
        if kind == "dna":
            text = "".join(rng.choice(list("ACGT"), 70))
            pieces = re.findall(".{1,4}", text)
        elif kind == "hostile":
            pieces = [p for t in rng.permutation(HOSTILE_TOKENS) for p in (" a", str(t))]
        else:
            source = {"prose": PROSE, "code": CODE, "arabic": ARABIC_TEXT, "emoji": EMOJI}[kind]
            order = rng.permutation(len(source))
            text = (" " if kind != "code" else "\n").join(source[j] for j in order)
            pieces = WORD.findall(text)
        made.append((kind, pieces))
    return made


class Corpus:
    """Tokens, keep, document [contexts, SEQ_LEN], the vocabulary and the documents' table."""

    def __init__(self, n_contexts: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.vocabulary: list[bytes] = [b"<|bos|>", *BYTE_TOKENS]
        self.number = {token: i for i, token in enumerate(self.vocabulary)}
        self.documents: list[tuple[str, str, str, str]] = []
        ids, document = [0], [-1]
        for number, (domain, pieces) in enumerate(_documents(rng, n_contexts * 2)):
            self.documents.append((f"{domain}/{number:04d}", "made up", domain, f"{number:064x}"))
            tokens = [t for piece in pieces for t in self._encode(piece)] + [0]
            ids += tokens
            document += [number] * len(tokens)
        size = n_contexts * SEQ_LEN
        assert len(ids) >= size, "more documents are needed to fill the contexts"
        self.tokens = np.array(ids[:size], np.uint32).reshape(n_contexts, SEQ_LEN)
        self.document = np.array(document[:size], np.int32).reshape(n_contexts, SEQ_LEN)
        self.keep = self.tokens != 0

    def _encode(self, piece: str) -> list[int]:
        """One token a piece; the bytes of anything outside ASCII and Arabic one by one."""
        raw = piece.encode()
        plain = piece.isascii() or piece in HOSTILE_TOKENS or "\u0600" <= piece.strip()[:1] < "\u0700"
        pieces = [raw] if plain else [bytes([b]) for b in raw]
        for token in pieces:
            if token not in self.number:
                self.number[token] = len(self.vocabulary)
                self.vocabulary.append(token)
        return [self.number[token] for token in pieces]


def _rules() -> dict[int, Callable[[bytes], bool]]:
    hostile = {token.encode() for token in HOSTILE_TOKENS}
    keywords = {b"def", b"class", b"for", b"if", b"return", b"try", b"while", b"import", b"except"}
    return {
        DNA: lambda t: bool(re.fullmatch(rb"[ACGT]{2,4}", t)),
        ARABIC: lambda t: t.strip()[:1] >= b"\xd8" and len(t) > 2,
        HOSTILE: lambda t: t in hostile,
        PARTIAL: lambda t: len(t) == 1 and t[0] >= 0x80,
        KEYWORD: lambda t: t.strip() in keywords,
        5: lambda t: t.strip().lower() == b"the",
        6: lambda t: b"\n" in t or b"\t" in t,
        DENSE: lambda t: t[:1].isspace() or len(t) < 4,
        9: lambda t: t.strip().isdigit(),
        10: lambda t: t.strip() in {b",", b".", b";", b":"},
        11: lambda t: t.strip()[:1].isupper(),
    }


def activations(corpus: Corpus, d_sae: int, seed: int) -> np.ndarray:
    """[rows, d_sae] float32: the rules, then features that fire on one to three word tokens."""
    rng = np.random.default_rng(seed)
    flat, keep = corpus.tokens.reshape(-1), corpus.keep.reshape(-1)
    used = np.unique(flat[keep])
    rules = _rules()
    acts = np.zeros((len(flat), d_sae), np.float32)
    for feature in range(d_sae):
        if feature == DEAD or (feature > 60 and feature % 37 == 0):
            continue
        if feature in rules:
            member = np.array([rules[feature](t) for t in corpus.vocabulary])
        else:
            member = np.zeros(len(corpus.vocabulary), bool)
            member[rng.choice(used, rng.integers(1, 4))] = True
        hit = member[flat] & keep
        recent = np.convolve(hit, np.ones(6), "full")[: len(hit)]
        strength = rng.gamma(3.0, 0.5, len(hit)) * (0.4 + 0.25 * recent)
        acts[:, feature] = np.where(hit, strength, 0)
    return acts.astype(np.float16).astype(np.float32)


def panels(corpus: Corpus, d_sae: int, d_in: int, seed: int) -> dict[str, np.ndarray]:
    """Logit weights, neuron weights and neighbours of a random decoder."""
    rng = np.random.default_rng(seed)
    decoder = rng.standard_normal((d_sae, d_in))
    decoder[1::9] = decoder[::9][: len(decoder[1::9])] + 0.6 * decoder[1::9]  # near twins
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    logits = rng.standard_normal((d_sae, len(corpus.vocabulary))) * 0.4
    logits[:, 257:] += rng.standard_normal(d_sae)[:, None] * 0.05
    order = np.argsort(logits, axis=1)
    edges = np.stack([logits.min(1), logits.max(1)], 1)
    histogram = np.stack([np.histogram(row, 40, tuple(e))[0] for row, e in zip(logits, edges, strict=True)])
    cosine = decoder @ decoder.T
    np.fill_diagonal(cosine, -2)
    near = np.argsort(-cosine, axis=1)[:, :10]
    weight = np.argsort(-np.abs(decoder), axis=1)[:, :10]
    corr = rng.uniform(-0.6, 0.9, (d_sae, 10))
    return {
        "stats/cos_enc_dec": rng.uniform(0.3, 0.95, d_sae),
        "stats/nearest_cosine": cosine.max(1),
        "stats/logit_kurtosis": rng.uniform(2.5, 9.0, d_sae),
        "logits/top_id": order[:, :-21:-1],
        "logits/top_value": np.take_along_axis(logits, order[:, :-21:-1], 1),
        "logits/bottom_id": order[:, :20],
        "logits/bottom_value": np.take_along_axis(logits, order[:, :20], 1),
        "logits/histogram": histogram,
        "logits/range": edges,
        "neurons/weight_id": weight,
        "neurons/weight_value": np.take_along_axis(decoder, weight, 1),
        "neurons/weight_share": np.take_along_axis(np.abs(decoder), weight, 1) / np.abs(decoder).sum(1, keepdims=True),
        "neurons/corr_id": rng.integers(0, d_in, (d_sae, 10)),
        "neurons/corr_value": np.take_along_axis(corr, np.argsort(-np.abs(corr), 1), 1),
        "neighbours/id": near,
        "neighbours/cosine": np.take_along_axis(cosine, near, 1),
        "map/pca": decoder[:, :2] * 3,
        "map/cluster": np.arange(d_sae) % 4,
        "stats/delta_loss": np.where(np.arange(d_sae) == DEAD, np.nan, rng.normal(0.02, 0.02, d_sae)),
        "stats/resampled_step": np.where(rng.random(d_sae) < 0.2, 150, -1),
        "effects/interval_abs": rng.uniform(0, 0.1, (d_sae, 11)),
        "effects/interval_samples": np.full((d_sae, 11), 2),
    }


def build_index(path: Path, *, d_sae: int, n_contexts: int, seed: int = 0) -> np.ndarray:
    """Writes an index to `path`; returns the dense activations [rows, d_sae] behind it."""
    corpus = Corpus(n_contexts, seed)
    acts = activations(corpus, d_sae, seed)
    d_in = 128
    writer = FeatureWriter(
        path,
        d_sae=d_sae,
        seq_len=SEQ_LEN,
        n_contexts=n_contexts,
        attributes={
            "d_in": d_in,
            "hook_point": "blocks.0.mlp.hook_post",
            "model": {"id": "tiny-relu-1l", "kind": "shipped", "sha256": "5e" * 32},
            "sae": {"path": "demo/tm", "sha256": "a1" * 32},
            "bos": 0,
            "provenance": {"text": "made up", "split": "heldout", "monosem": "test"},
        },
        vocabulary=corpus.vocabulary,
        documents=corpus.documents,
    )
    for start in range(0, n_contexts, 16):
        part = slice(start, min(start + 16, n_contexts))
        block = acts[part.start * SEQ_LEN : part.stop * SEQ_LEN]
        rows, features = np.nonzero(block)
        tokens, keep, document = corpus.tokens[part], corpus.keep[part], corpus.document[part]
        rows_of_index = rows + start * SEQ_LEN
        writer.append(start, tokens, keep, document, rows_of_index, features, block[rows, features])
    writer.finish(
        panels(corpus, d_sae, d_in, seed), lambda firings: co_activation.panels(firings) | rules.panels(firings)
    )
    return acts


def write_sae_directory(path: Path, *, d_sae: int, seed: int = 0) -> None:
    """config.json, metrics.jsonl and eval.json of a trained dictionary (no weights)."""
    path.mkdir(parents=True)
    config: dict[str, Any] = {
        "kind": "sae",
        "format": 1,
        "recipe": "towards-monosemanticity",
        "d_in": 128,
        "d_sae": d_sae,
        "hook_point": "blocks.0.mlp.hook_post",
        "model": {"id": "tiny-relu-1l", "kind": "shipped", "sha256": "5e" * 32},
        "activation": "relu",
        "k": None,
        "train": {"tokens": 4_000_000, "seed": seed},
    }
    (path / "config.json").write_text(json.dumps(config))
    steps = [{"step": s, "loss": 1 / (1 + s), "l0": 30 - s, "fvu": 0.2} for s in range(5)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    metric = {"value": 23.4, "ci95": [23.0, 23.8], "formula": "mean ‖f‖₀", "version": 1}
    report = {"format": 1, "tokens": 100_000, "metrics": {"l0": metric}, "by_domain": {}}
    (path / "eval.json").write_text(json.dumps(report))


def build_root(root: Path, *, d_sae: int = 64, n_contexts: int = 96) -> np.ndarray:
    """A runs root: `demo/tm` complete, `demo/no-index` without an index; the activations."""
    write_sae_directory(root / "demo" / "tm", d_sae=d_sae)
    write_sae_directory(root / "demo" / "no-index", d_sae=d_sae, seed=1)
    (root / "demo" / "acts.zarr").mkdir()
    return build_index(root / "demo" / "tm" / "features.zarr", d_sae=d_sae, n_contexts=n_contexts)


if __name__ == "__main__":  # python -m tests.browser_fixture DIRECTORY: something to look at
    build_root(Path(sys.argv[1]), d_sae=512, n_contexts=1000)
