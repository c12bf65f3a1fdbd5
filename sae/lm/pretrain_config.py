"""The settings of pretraining, and how they are read from texts such as `n_ctx=128`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sae.lm.transformer import TransformerConfig

_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": lambda text: {"true": True, "false": False}[text],
    "tuple[int, ...]": lambda text: tuple(int(part) for part in text.split(",") if part),
}


@dataclass(frozen=True)
class PretrainConfig:
    """How a native transformer is trained; `train_tokens` counts every epoch of a text that is shorter.

    The blocks learn at `lr · block_lr_share`, the embeddings and the unembedding at `lr`. At the full rate neurons
    become sparse: a few of them per token then carry all that the MLP does. `keep_at` are the token counts at which a
    copy of the model is kept.

    `repeat_share` of the contexts hold one segment of the text over and over, of `repeat_tokens` (shortest, longest)
    tokens. `document_share` of the contexts begin where a document begins, the rest anywhere. With `context_bos` every
    context begins with BOS. `attention_std` is the spread of the initial weights of queries, keys and values, and with
    sqrt(2 n_layers) of the heads' outputs; with `sinusoid_positions` the position embeddings begin as sinusoids of size
    0.5, and learn from there.
    """

    train_tokens: int = 60_000_000
    batch_contexts: int = 32
    lr: float = 4e-3
    block_lr_share: float = 1.0
    warmup_steps: int = 200
    final_lr_share: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    save_minutes: float = 3.0
    eval_steps: int = 500
    tokenizer_characters: int = 40_000_000
    keep_at: tuple[int, ...] = ()
    repeat_share: float = 0.0
    repeat_tokens: tuple[int, ...] = (12, 64)
    document_share: float = 0.0
    context_bos: bool = False
    attention_std: float = 0.02
    sinusoid_positions: bool = False

    def __post_init__(self) -> None:
        for name in ("train_tokens", "batch_contexts", "eval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"pretrain: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("lr", "block_lr_share", "attention_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"pretrain: {name} must be positive, got {getattr(self, name)}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"pretrain: weight_decay must not be negative, got {self.weight_decay}.")
        for name in ("repeat_share", "document_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"pretrain: {name} must be between 0 and 1, got {getattr(self, name)}.")
        if len(self.repeat_tokens) != 2 or not 1 <= self.repeat_tokens[0] <= self.repeat_tokens[1]:
            raise ValueError(
                f"pretrain: repeat_tokens must be two lengths, the shorter first, such as 12,64; got "
                f"{','.join(map(str, self.repeat_tokens))}."
            )
        for tokens in self.keep_at:
            if not 0 <= tokens <= self.train_tokens:
                raise ValueError(f"pretrain: keep_at is {tokens:,}; expected 0 … train_tokens = {self.train_tokens:,}.")

    @property
    def betas(self) -> tuple[float, float]:
        return (0.9, 0.95)


def configured(
    assignments: Iterable[str], shape: TransformerConfig | None = None, **given: Any
) -> tuple[TransformerConfig, PretrainConfig]:
    """The architecture and the training of `given` settings and of texts such as `n_ctx=128`, which win.

    What neither gives is as in `shape`, or else the default.

    Raises: ValueError for an unknown setting, naming the nearest one, and for a value of the wrong type.
    """
    types = {each.name: str(each.type) for kind in (TransformerConfig, PretrainConfig) for each in fields(kind)}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in types:
            near = get_close_matches(name, types, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Settings: {', '.join(types)}."
            raise ValueError(f"pretraining has no setting {name!r}. {hint}")
        try:
            given[name] = _PARSERS[types[name]](value)
        except (KeyError, ValueError) as error:
            raise ValueError(f"pretrain: {name} must be of type {types[name]}, got {value!r}.") from error
    changes = {name: given.pop(name) for name in TransformerConfig.__dataclass_fields__ if name in given}
    return replace(shape or TransformerConfig(), **changes), PretrainConfig(**given)


def shape_of(directory: Path) -> TransformerConfig:
    """The architecture of the model that `sae pretrain` wrote to `directory`.

    Raises: ValueError if there is no such model.
    """
    try:
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{directory} holds no finished model of `sae pretrain`: it has no config.json.") from error
    if settings.get("kind") != "native-transformer":
        raise ValueError(f"{directory} holds no model of `sae pretrain`, the only kind that training can start from.")
    return TransformerConfig.from_dict(settings)
