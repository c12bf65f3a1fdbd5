"""From documents to contexts: tokenised in pieces and packed end to end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from sae.text.documents import Document
from sae.text.tokenizer import pieces_of

TOKENISE_DOCUMENTS = 256
TOKENISE_CHARACTERS = 1 << 22
PIECE_CHARACTERS = 1 << 18
FORWARD_TOKENS = 8192  # per forward pass: bounds memory; part of a shard's bytes, so it must not change


class Tokenising(Protocol):
    """What packing needs of a language model."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def bos_id(self) -> int | None: ...


def packed(tokens: np.ndarray, seq_len: int, bos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The tokens as contexts [n, seq_len], the last one padded, and a mask that is False on padding and BOS."""
    padding = (0, -len(tokens) % seq_len)
    filled = np.pad(np.ones(len(tokens), bool), padding).reshape(-1, seq_len)
    contexts = np.pad(tokens, padding).reshape(-1, seq_len)
    return contexts, filled & (contexts != (-1 if bos_id is None else bos_id))


def tokenised(
    model: Tokenising, documents: Iterable[tuple[int, Document]]
) -> Iterator[tuple[int, Document, np.ndarray]]:
    """Numbered documents with their token ids, BOS first. Several are read and tokenised together.

    A long document is tokenised in pieces, because the tokenizer's result takes hundreds of times the text's size.
    """
    bos = np.array([] if model.bos_id is None else [model.bos_id], np.uint32)
    for some in _at_once(documents):
        pieces = [list(pieces_of(model.tokenizer, document.text, PIECE_CHARACTERS)) for _, document in some]
        texts = [piece for mine in pieces for piece in mine]
        encodings = iter(model.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for (number, document), mine in zip(some, pieces, strict=True):
            yield number, document, np.concatenate([bos, *(np.array(next(encodings).ids, np.uint32) for _ in mine)])


def _at_once(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    pending: list[tuple[int, Document]] = []
    characters = 0
    for number, document in documents:
        pending.append((number, document))
        characters += len(document.text)
        if len(pending) >= TOKENISE_DOCUMENTS or characters >= TOKENISE_CHARACTERS:
            yield pending
            pending, characters = [], 0
    yield pending
