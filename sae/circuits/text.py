"""Contexts of one split of a text, for lenses: the same documents are held out as everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.lm import LanguageModel
from sae.text.documents import Document, TextError
from sae.text.packing import packed, tokenised
from sae.text.sources import TextSource
from sae.text.splits import DIVIDED


@dataclass(frozen=True, eq=False)
class Contexts:
    """Token ids in contexts.

    `keep` is False at BOS and padding. `domain` is the place of each token's domain in `domains`, −1 at padding.
    """

    tokens: Int[Tensor, "contexts pos"]
    keep: Bool[Tensor, "contexts pos"]
    domain: Int[Tensor, "contexts pos"]
    domains: list[str]

    @property
    def predicted(self) -> Bool[Tensor, "contexts pos"]:
        """Where the next token is part of the text: there predictions have a true answer."""
        found = torch.zeros_like(self.keep)
        found[:, :-1] = self.keep[:, 1:]
        return found

    def __getitem__(self, rows: slice) -> Contexts:
        return Contexts(self.tokens[rows], self.keep[rows], self.domain[rows], self.domains)


def contexts_of(
    model: LanguageModel, source: TextSource, split: str, n: int, *, context_tokens: int | None = None
) -> Contexts:
    """The first `n` contexts of a split ("heldout" or "train"), begun as the model's contexts usually begin.

    A text with fewer gives fewer. Raises: TextError if the split has no text.
    """
    width = min(context_tokens or model.context_tokens, model.context_tokens)
    found, labels, names = list[np.ndarray](), list[np.ndarray](), list[str]()
    missing = n * width
    for document, ids in tokenised(model, _parts(source.for_model(model), split)):
        if document.domain not in names:
            names.append(document.domain)
        found.append(ids)
        labels.append(np.full(len(ids), names.index(document.domain)))
        missing -= len(ids)
        if missing <= 0:
            break
    if not found:
        raise TextError(f"{source.name} has no {split} text: one document in twenty is held out. Give more text.")
    rows = packed(np.concatenate(found), width, model.bos_id, context_bos=model.context_bos)
    domain = np.where(rows.place >= 0, np.concatenate(labels)[rows.place], -1)
    tokens, keep, domain = (each[:n] for each in (rows.tokens, rows.keep, domain))
    return Contexts(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(keep), torch.from_numpy(domain), names)


def _parts(source: TextSource, split: str) -> Iterator[tuple[Document, list[Document]]]:
    for document in source.documents():
        parts = DIVIDED.parts(document).get(split)
        if parts:
            yield document, parts
