"""Measures a model of `sae pretrain` on a validation text: loss per domain, baselines, its neurons, and a few samples.

    python scripts/model_card.py LM_DIR --validation PATH [--json figures.json]

Baselines are the model with its MLP zero-ablated, a unigram and an interpolated bigram. The latter two are counted on
the model's training tokens (LM_DIR/tokens-train.npy); the bigram's weights are fitted by EM on
LM_DIR/tokens-heldout.npy. Losses are in nats per token; BOS is never a target. The neurons' figures are those of
`sae.lm.held_out`: on the validation text, and over training as the log has them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.lm import NativeModel
from sae.lm.held_out import held_out_contexts, neuron_figures
from sae.lm.transformer import no_hook
from sae.text.sources import open_text

NEURON_CONTEXTS = 256


class Bigram:
    """P(b | a) = w2 · n(a,b)/n(a) + w1 · n(b)/n + w0/V."""

    def __init__(self, tokens: np.ndarray, d_vocab: int) -> None:
        self.d_vocab = d_vocab
        self.unigram = (np.bincount(tokens, minlength=d_vocab) + 1) / (len(tokens) + d_vocab)
        first = np.bincount(tokens[:-1], minlength=d_vocab)
        codes = tokens[:-1].astype(np.int64) * d_vocab + tokens[1:]
        self.codes, counts = np.unique(codes, return_counts=True)
        self.conditional = counts / first[self.codes // d_vocab]
        self.weights = np.array([1 / 3, 1 / 3, 1 / 3])

    def parts(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        codes = a.astype(np.int64) * self.d_vocab + b
        place = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        bigram = np.where(self.codes[place] == codes, self.conditional[place], 0.0)
        return np.stack([bigram, self.unigram[b], np.full(len(b), 1 / self.d_vocab)])

    def fit(self, tokens: np.ndarray, iterations: int = 30) -> None:
        parts = self.parts(tokens[:-1], tokens[1:])
        for _ in range(iterations):
            joint = self.weights[:, None] * parts
            self.weights = (joint / joint.sum(0)).mean(1)

    def loss(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return -np.log(self.weights @ self.parts(a, b))


def packed(model: NativeModel, validation: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Validation tokens `[BOS] doc [BOS] doc …` and the domain number of each."""
    domains: list[str] = []
    tokens: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    for document in open_text(validation).documents():
        if document.domain not in domains:
            domains.append(document.domain)
        ids = [model.bos_id, *model.tokenizer.encode(document.text, add_special_tokens=False).ids]
        tokens.append(np.array(ids))
        numbers.append(np.full(len(ids), domains.index(document.domain)))
    return np.concatenate(tokens), np.concatenate(numbers), domains


def windows(tokens: np.ndarray, numbers: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Contexts with one more token as target, 32 at a time; an incomplete last context is dropped."""
    count = (len(tokens) - 1) // width
    starts = np.arange(count) * width
    for chunk in np.array_split(starts, max(1, count // 32)):
        yield (
            np.stack([tokens[s : s + width + 1] for s in chunk]),
            np.stack([numbers[s + 1 : s + width + 1] for s in chunk]),
        )


def without_mlps(name: str, value: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(value) if name.endswith("mlp.hook_post") else value


@torch.inference_mode()
def losses(model: NativeModel, contexts: np.ndarray, *, ablate: bool = False) -> np.ndarray:
    ids = torch.from_numpy(contexts.astype(np.int64))
    logits = model.module(ids[:, :-1], without_mlps if ablate else no_hook)
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return found.numpy()


def sample(model: NativeModel, prompt: str, new_tokens: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = model.encode_prompt(prompt)
    for _ in range(new_tokens):
        p = torch.softmax(model.logits(torch.tensor([ids[-model.context_tokens :]]))[0, -1] / 0.8, -1)
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
    return model.tokenizer.decode(ids)


def measure(directory: Path, validation: str) -> dict[str, Any]:
    model = NativeModel(directory, str(directory))
    train = np.load(directory / "tokens-train.npy", mmap_mode="r", allow_pickle=False)
    bigram = Bigram(np.asarray(train), model.d_vocab)
    bigram.fit(np.asarray(np.load(directory / "tokens-heldout.npy", allow_pickle=False))[:200_000])
    tokens, numbers, domains = packed(model, validation)
    names = ("model", "mlp_zero", "bigram", "unigram")
    sums = {name: np.zeros(len(domains)) for name in (*names, "tokens")}
    for contexts, domain in windows(tokens, numbers, model.context_tokens):
        if model.context_bos:  # as in its training
            contexts[:, 0] = model.bos_id
        a, b = contexts[:, :-1].reshape(-1), contexts[:, 1:].reshape(-1)
        counted = b != model.bos_id
        found = {
            "model": losses(model, contexts),
            "mlp_zero": losses(model, contexts, ablate=True),
            "bigram": bigram.loss(a, b),
            "unigram": -np.log(bigram.unigram[b]),
            "tokens": np.ones(len(b)),
        }
        for name, values in found.items():
            sums[name] += np.bincount(domain.reshape(-1)[counted], values[counted], minlength=len(domains))
    total = sums["tokens"].sum()
    return {
        "tokens": int(total),
        "all": {name: sums[name].sum() / total for name in names},
        "by_domain": {
            domain: {"tokens": int(sums["tokens"][i])} | {name: sums[name][i] / sums["tokens"][i] for name in names}
            for i, domain in enumerate(domains)
        },
        "neurons": neuron_figures(model.module, held_out_contexts(tokens, model.context_tokens, NEURON_CONTEXTS)),
        "training": training(directory / "metrics.jsonl"),
        "samples": {prompt: sample(model, prompt, 60, 0) for prompt in ("The ", "def ", "")},
    }


def training(log: Path) -> list[dict]:
    """The entries of the log that measured held-out text."""
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [entry for entry in entries if "held_out_loss" in entry]


def print_neurons(found: dict) -> None:
    """One table of the neurons on the validation text, and how they came to be so."""
    columns = ("l0", "dead", "participation_ratio", "ce_gap", "score_zero_top10")
    print(f"\n| tokens seen | held-out loss | layer | {' | '.join(columns)} |")
    print(f"|---:|---:|---:|{'---:|' * len(columns)}")
    rows = [(f"{entry['tokens']:,}", entry["held_out_loss"], entry.get("neurons", [])) for entry in found["training"]]
    for tokens, loss, layers in [*rows, ("**validation text**", found["all"]["model"], found["neurons"])]:
        for layer, neurons in enumerate(layers):
            print(f"| {tokens} | {loss:.3f} | {layer} | " + " | ".join(str(neurons[name]) for name in columns) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory that `sae pretrain` wrote")
    parser.add_argument("--validation", required=True, help="text to measure on")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    found = measure(args.model, args.validation)
    print(f"| domain | tokens | model | MLP zeroed | bigram | unigram |\n|---|{'---:|' * 5}")
    rows = {"**all**": {"tokens": found["tokens"], **found["all"]}} | dict(sorted(found["by_domain"].items()))
    for domain, row in rows.items():
        figures = (row[name] for name in ("model", "mlp_zero", "bigram", "unigram"))
        print(f"| {domain} | {row['tokens']:,} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    print_neurons(found)
    for prompt, text in found["samples"].items():
        print(f"\nprompt {prompt!r}:\n{text}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0 if math.isfinite(found["all"]["model"]) else 1


if __name__ == "__main__":
    sys.exit(main())
