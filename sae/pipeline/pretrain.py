"""Train a small language model on text."""

from __future__ import annotations

from pathlib import Path

from sae.lm import pretrain as pretraining
from sae.lm.pretrain import PretrainConfig
from sae.lm.transformer import TransformerConfig
from sae.pipeline.harvest import Text, source_of


def pretrain(
    text: Text, out: str | Path, *, shape: TransformerConfig | None = None, config: PretrainConfig | None = None
) -> Path:
    """Trains a tokenizer and then a one-layer transformer on a text; returns the directory of the model.

    Repeat the call to continue after an interruption: the result is the same bit for bit.
    Raises: TextError for text that cannot be read; ValueError for settings other than those `out` was started with.
    """
    return pretraining.pretrain(
        source_of(text), Path(out), shape=shape or TransformerConfig(), config=config or PretrainConfig()
    )
