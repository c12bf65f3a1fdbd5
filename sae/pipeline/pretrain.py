"""Train a small language model on text."""

from __future__ import annotations

from pathlib import Path

from sae.lm import pretrain as pretraining
from sae.lm.pretrain_config import PretrainConfig, shape_of
from sae.lm.transformer import TransformerConfig
from sae.pipeline.harvest import Text, source_of


def pretrain(
    text: Text,
    out: str | Path,
    *,
    shape: TransformerConfig | None = None,
    config: PretrainConfig | None = None,
    start: str | Path | None = None,
) -> Path:
    """Trains a tokenizer and then a transformer on a text; returns the directory of the model.

    With `start`, the directory of such a model, training starts from its weights, with its tokenizer and its shape.

    Repeat the call to continue after an interruption: the result is the same bit for bit.
    Raises: TextError for text that cannot be read; ValueError for settings other than those `out` was started with.
    """
    start = None if start is None else Path(start)
    if shape is None:
        shape = TransformerConfig() if start is None else shape_of(start)
    return pretraining.pretrain(source_of(text), Path(out), shape=shape, config=config or PretrainConfig(), start=start)
