"""Fakes: a random native model with a real tokenizer, made-up documents and rows, a tracker; ready in a second."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.sites import Site
from sae.jobs.checkpoint import write_tensors
from sae.lm.transformer import Transformer, TransformerConfig
from sae.text.documents import Document
from sae.text.sources import TextSource
from sae.text.tokenizer import BOS, train_tokenizer
from sae.training.rows import Batch
from store.common import write_json

SEED = "MONOSEM_TEST_SEED"  # the variable with the seed of what tests draw at random, such as the moment of a kill
SHAPE = TransformerConfig(d_model=16, d_mlp=32, n_heads=2, d_head=8, n_ctx=32, d_vocab=300)
HOOK_POINT = "blocks.0.mlp.hook_post"
WORDS = "the quick brown fox jumps over lazy dogs while curious cats watch from sunny windows at night".split()  # noqa: SIM905
DOMAINS = ("prose", "dna", "numbers")


def made_up_documents(n: int, *, seed: int = 0) -> list[Document]:
    """n documents of three domains, about 60 tokens each; no two are the same."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        domain = DOMAINS[i % 3]
        if domain == "prose":
            text = " ".join(rng.choices(WORDS, k=30)) + f" {i}."
        elif domain == "dna":
            text = "".join(rng.choices("ACGT", k=90)) + f" {i}"
        else:
            text = " ".join(str(rng.randrange(1000)) for _ in range(20)) + f" {i}"
        made.append(Document(f"doc-{i}", text, domain, f"source-{i % 5}"))
    return made


def text_source(documents: list[Document], name: str = "made up") -> TextSource:
    """The documents as a source, as `sae.text.sources.open_text` would give them (in its fixed shuffled order)."""
    return TextSource(
        name, lambda _: iter(documents), sha256("\n".join(d.text for d in documents).encode()).hexdigest()
    )


def write_jsonl(path: Path, documents: list[Document]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for d in documents:
            file.write(json.dumps({"id": d.id, "text": d.text, "domain": d.domain, "source": d.source}) + "\n")
    return path


def random_transformer(seed: int = 0, shape: TransformerConfig = SHAPE) -> Transformer:
    """Weights without special values: biases and norm weights are random too, the residual stream is not centred.

    Rounded to 16 bits, as a shipped model's are, so that it equals what is read back from disk.
    """
    model = Transformer(shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if name.endswith("weight") else 0.0))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 1.5 / p.shape[-1] ** 0.5)
            p.copy_(p.half())
    return model.eval().requires_grad_(False)


def random_sae(
    d_in: int, hook_point: str = HOOK_POINT, *, d_sae: int = 24, activation: str = "relu", k: int | None = None
) -> SAE:
    """A dictionary of random weights whose features fire on half of all rows."""
    made = SAE(d_in, d_sae, activation=activation, k=k)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    made.config = {"hook_point": hook_point}
    return made.requires_grad_(False).eval()


def write_model(directory: Path, *, seed: int = 0, shape: TransformerConfig = SHAPE) -> Path:
    """A model directory in the shipped layout: model.safetensors, tokenizer.json, config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in random_transformer(seed, shape).state_dict().items()}
    write_tensors(directory / "model.safetensors", state, {"kind": "native-transformer"})
    tokenizer = train_tokenizer((d.text for d in made_up_documents(300, seed=9)), shape.d_vocab)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "config.json", {"kind": "native-transformer", "format": 1, **shape.to_dict(), "bos_token": BOS}
    )
    return directory


class FewRows:
    """Made-up rows near a few directions, the same on every call."""

    d_in = 8

    def batch(self, step: int) -> Batch:
        return Batch(self.sample(16, step))

    def sample(self, n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, 8, generator=g)
        return noise + 3 * torch.eye(8)[torch.randint(8, (n,), generator=g)]


class FewTargets(FewRows):
    """The same with a target of another width, as transcoders need."""

    d_out = 12

    def batch(self, step: int) -> Batch:
        return Batch(self.sample(16, step), self.sample_targets(16, step))

    def sample_targets(self, n: int, seed: int) -> Tensor:
        to_target = torch.randn(8, 12, generator=torch.Generator().manual_seed(99))
        return torch.sin(self.sample(n, seed) @ to_target)


class FewSites(FewRows):
    """The same as rows of two sites, as crosscoders need."""

    sites = (Site("a", 5, 1.0), Site("b", 3, 1.0))


class FewRowsOfAModel(FewRows):
    """The same with the rest of a model, as end-to-end training needs."""

    def batch(self, step: int) -> Batch:
        return Batch(self.sample(16, step), resid=torch.zeros(16, 8))

    def downstream(self, x: Tensor, resid: Tensor) -> Tensor:
        return x + resid


class FakeWandb(ModuleType):
    """Records the arguments of `wandb.init` and the entries that each of its runs logs (`told`)."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.asked: list[dict[str, Any]] = []
        self.told: list[list[tuple[int, Mapping[str, float]]]] = []
        self.finished = 0

    def init(self, **asked: Any) -> FakeWandb:
        self.asked.append(asked)
        self.told.append([])
        return self

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.told[-1].append((step, values))

    def finish(self) -> None:
        self.finished += 1


class WordCounts:
    """A text model whose truth is known: how often each of a few words is in the text, as a vector of length 1."""

    FLOOR = 1e-3  # added to each count, so that no text is without a direction

    def __init__(self, words: Sequence[str], name: str = "word counts") -> None:
        self.words, self.id = list(words), name
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        self.asked += [] if query else texts
        found = [re.findall(r"\w+", text) for text in texts]
        counts = np.array([[self.FLOOR + words.count(word) for word in self.words] for words in found], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)
