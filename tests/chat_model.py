"""A random-weight instruct model in Hugging Face's layout, with turn markers and a chat template, and conversations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from fakes import WORDS

# The turns of Qwen and SmolLM.
CHATML = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKERS = ["<|im_start|>", "<|im_end|>"]


def write_instruct_model(directory: Path, tokenizer: Path, *, template: str | None = CHATML) -> Path:
    """Two layers like Llama's, the tokenizer with two turn markers, and a few embedding rows without a token."""
    import transformers

    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    config = transformers.LlamaConfig(
        vocab_size=308, num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=300, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    text: Any = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(tokenizer), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    text.add_special_tokens({"additional_special_tokens": MARKERS})
    text.chat_template = template
    text.save_pretrained(directory)
    return directory


def conversations(n: int) -> list[list[dict[str, str]]]:
    """n conversations of two or four turns, some with a system message; no two are the same."""
    rng = random.Random(5)
    made = []
    for number in range(n):
        messages = [{"role": "system", "content": "be brief"}] if number % 3 == 0 else []
        for turn in range(1 + number % 2):
            messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=6)) + f" {number} {turn}?"})
            messages.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=8)) + "."})
        made.append(messages)
    return made


def template_ids(directory: Path, messages: list[dict[str, str]], *, reply: bool = False) -> list[int]:
    """What transformers itself makes of the messages."""
    import transformers

    found: Any = transformers.AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, add_generation_prompt=reply, return_dict=True
    )
    return list(found["input_ids"])
