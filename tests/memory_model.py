"""A two-layer model set by hand in which it is known where facts are: a memory that tracing and ROME must find.

Each token has its own direction; vectors and their negatives make every mean 0 and every norm equal, so that LayerNorm
only rescales. Layer 0's MLP writes, at the subject's token, the direction of the object; neuron i fires for subject i
alone, and one neuron for each other word. Layer 1's head moves it from the subject to every later token. Nothing else
writes. A prompt is BOS, words, subject, words; its answer is the subject's object.
"""

from __future__ import annotations

from pathlib import Path

import torch
from fakes import made_up_documents
from torch import Tensor

from sae.jobs.checkpoint import write_tensors
from sae.lm import NativeModel
from sae.lm.transformer import Transformer, TransformerConfig
from sae.text.tokenizer import BOS, train_tokenizer
from store.common import write_json

SUBJECTS, OBJECTS, WORDS = range(10, 18), range(20, 28), range(30, 34)
TOKENS = [0, *SUBJECTS, *WORDS]  # with a direction of their own
D_HALF = len(TOKENS) + len(OBJECTS)
SHAPE = TransformerConfig(
    d_model=2 * D_HALF, d_mlp=len(TOKENS), n_heads=1, d_head=len(OBJECTS) + 1, n_layers=2, n_ctx=16, d_vocab=300
)


def both(x: Tensor) -> Tensor:
    """(x, −x) along the last axis: mean 0."""
    return torch.cat([x, -x], -1)


def object_of(subject: int) -> int:
    return OBJECTS[SUBJECTS.index(subject)]


@torch.no_grad()
def memory_model(directory: Path) -> NativeModel:
    model = Transformer(SHAPE)
    for parameter in model.parameters():
        parameter.zero_()
    for name, parameter in model.named_parameters():
        if ".ln" in name or name.startswith("ln"):
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    token, thing = torch.eye(D_HALF)[: len(TOKENS)], torch.eye(D_HALF)[len(TOKENS) :]
    model.embed.weight[TOKENS] = both(token)
    norm = D_HALF**0.5  # LayerNorm makes ±1 in one of D_HALF pairs ±√D_HALF
    first, second = model.blocks[0].mlp, model.blocks[1].attn
    getattr(first, "in").weight.copy_(both(token) / (2 * norm))  # 1 for its own token, 0 for others
    getattr(first, "in").bias.fill_(-0.5)
    idle = getattr(model.blocks[1].mlp, "in")  # fires as layer 0's, and its output is 0
    idle.weight.copy_(both(token) / (2 * norm))
    idle.bias.fill_(-0.05)
    written = torch.zeros(D_HALF, len(TOKENS))
    written[:, 1 : 1 + len(SUBJECTS)] = 2 * thing.T
    first.out.weight.copy_(both(written.T).T)
    # layer 1: a constant query finds the subject's token; values are objects
    second.q.bias[-1] = 1.0
    second.k.weight[-1] = both(token[1 : 1 + len(SUBJECTS)].sum(0)) * 20
    second.v.weight[: len(OBJECTS)] = both(thing)
    second.o.weight[:, : len(OBJECTS)] = both(thing).T
    model.unembed.weight[list(OBJECTS)] = both(thing) * 2
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", dict(model.state_dict()), {"kind": "native-transformer"})
    train_tokenizer((d.text for d in made_up_documents(300, seed=9)), 300).save(str(directory / "tokenizer.json"))
    settings = {"kind": "native-transformer", "format": 1, **SHAPE.to_dict(), "bos_token": BOS}
    write_json(directory / "config.json", settings)
    return NativeModel(directory, "memory")
