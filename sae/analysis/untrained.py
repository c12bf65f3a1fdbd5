"""A model without what it has learned, for a while: its matrices shuffled, or drawn anew.

The caller holds the model's lock. The weights are restored at the end of the `with` block, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sae.lm import LanguageModel

INITIAL_STD = 0.02  # of GPT-2


@contextmanager
def matrices_shuffled(model: LanguageModel, seed: int = 0) -> Iterator[LanguageModel]:
    """The entries of every weight matrix are in a random order; vectors (biases, norms) stay.

    Source: Bricken et al. 2023, "randomised" transformer.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(name: str, p: Tensor) -> Tensor:
        return p if p.dim() < 2 else p.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p)

    with _changed(model, shuffled):
        yield model


@contextmanager
def weights_initialised(model: LanguageModel, seed: int = 0) -> Iterator[LanguageModel]:
    """Every matrix is drawn from N(0, 0.02²), biases are 0 and norm weights 1: a model before training, as GPT-2's."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, p: Tensor) -> Tensor:
        if p.dim() >= 2:
            return (torch.randn(p.shape, generator=generator) * INITIAL_STD).to(p)
        return torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)

    with _changed(model, drawn):
        yield model


@contextmanager
def _changed(model: LanguageModel, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    module: torch.nn.Module = model.module  # type: ignore[attr-defined]
    parameters = dict(module.named_parameters())
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            _overwrite(p, change(name, p.detach()))
        yield
    finally:
        for name, p in parameters.items():
            _overwrite(p, kept[name])


@torch.no_grad()
def _overwrite(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)
