"""A GPT-2 of random weights, of two layers, whose first position is a sink: a residual vector of 100 times the norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

N_CTX, D_MODEL = 32, 16


def write_sink_model(directory: Path, tokenizer: Path, *, sink_norm: float = 300.0) -> Any:
    """Saves it in Hugging Face's layout, and returns the plain model; without a sink if the norm is 0."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(7)
    sizes = {"n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": 2, "n_head": 2}
    plain = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0, initializer_range=0.2, **sizes)
    ).eval()
    plain.transformer.wpe.weight.data[0] += sink_norm * torch.nn.functional.normalize(torch.randn(D_MODEL), dim=0)
    plain.save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(directory)
    return plain
