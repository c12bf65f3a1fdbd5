"""Whether a directory in Hugging Face's layout is whole: settings, every part of the weights, a tokenizer.

What is missing would be made up on opening: a weight gets random numbers, a tokenizer an empty vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae.lm.base import ModelError, read_json_file

# What decides the shapes, by the names it has in Hugging Face's configurations. Each has a default there, which would
# be taken for a missing value; with another number of heads, weights of the same shapes compute something else.
_SIZES = {
    "the number of layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "the number of attention heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"),
    "the width": ("hidden_size", "n_embd", "d_model", "n_embed", "model_dim", "dim"),
    "the size of the vocabulary": ("vocab_size", "padded_vocab_size"),
}
_WITHOUT_HEADS = ("mamba", "rwkv", "xlstm", "recurrent")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
NO_WEIGHTS = " or ".join(WEIGHTS)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<suffix>safetensors|bin)")
# Files that hold a vocabulary; the others of a tokenizer only configure it.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


def require_whole(path: Path) -> None:
    """Raises: ModelError naming what a model directory lacks, and what to do about it."""
    config = read_json_file(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{path}/config.json has no model_type, so its architecture is not known. Copy the model's own config.json "
            "into the directory, or save the model again with save_pretrained."
        )
    missing = _missing_parts(path)
    if missing == [NO_WEIGHTS]:
        raise ModelError(f"{path} has no weights: no {NO_WEIGHTS}. Download or copy the whole model into it.")
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ModelError(f"{path} lacks {shown}: a part of the model's weights. Download or copy the directory again.")
    if not any((path / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"{path} has no tokenizer: none of {', '.join(_VOCABULARIES)}. Copy the model's tokenizer files into the "
            "directory (tokenizer.save_pretrained writes them)."
        )
    _require_sizes(config, path)


def _require_sizes(config: dict[str, Any], path: Path) -> None:
    if any(isinstance(value, dict) and name.endswith("_config") for name, value in config.items()):
        return  # sizes are in the parts of a model of several kinds of input, some of them left to defaults
    without_heads = any(name in config["model_type"] for name in _WITHOUT_HEADS)
    for what, names in _SIZES.items():
        if not any(name in config for name in names) and not ("heads" in what and without_heads):
            raise ModelError(
                f"{path}/config.json lacks {what} ({', '.join(names[:3])} …). Copy the model's own config.json "
                "into the directory."
            )


def _missing_parts(path: Path) -> list[str]:
    """The weight files that are named but not there: by the index, or by the numbers in the parts' own names."""
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if index.is_file():
            parts = read_json_file(index).get("weight_map")
            if not isinstance(parts, dict) or not parts:
                raise ModelError(f"{index} names no parts (weight_map). Download or copy the directory again.")
            return sorted({str(part) for part in parts.values() if not (path / str(part)).is_file()})
    if any((path / name).is_file() for name in WEIGHTS):
        return []
    found = [match for file in sorted(path.iterdir()) if (match := _PART.fullmatch(file.name))]
    if not found:
        return [NO_WEIGHTS]
    one = found[0]
    names = [
        f"{one['stem']}-{number:05d}-of-{one['count']}.{one['suffix']}" for number in range(1, int(one["count"]) + 1)
    ]
    return [name for name in names if not (path / name).is_file()] or [f"{one['stem']}.{one['suffix']}.index.json"]
