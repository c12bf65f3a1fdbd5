"""From documents to contexts: tokenised in pieces and packed end to end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from sae.text.documents import Document, Form
from sae.text.tokenizer import pieces_of

TOKENISE_DOCUMENTS = 256
TOKENISE_CHARACTERS = 1 << 22
PIECE_CHARACTERS = 1 << 18
FORWARD_TOKENS = 8192  # per forward pass: bounds memory; part of a shard's bytes, so it must not change

Key = TypeVar("Key")


class Tokenising(Protocol):
    """What packing needs of a language model."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def special_tokenizer(self) -> Tokenizer: ...
    @property
    def bos_id(self) -> int | None: ...


class Packed(NamedTuple):
    """Contexts [n, seq_len]: token ids; `keep`, False on BOS and padding; `place`, each position's token in the text.

    `place` is −1 on padding; a BOS that is not in the text has the place of the token after it.
    """

    tokens: np.ndarray
    keep: np.ndarray
    place: np.ndarray


def text_tokens(seq_len: int, context_bos: bool) -> int:
    """Tokens of the text in a context of `seq_len` positions, which may begin with a BOS."""
    return seq_len - 1 if context_bos else seq_len


def packed(tokens: np.ndarray, seq_len: int, bos_id: int | None, *, context_bos: bool = False) -> Packed:
    """The tokens as contexts, the last one padded.

    With `context_bos` each context is a BOS and `seq_len` − 1 tokens of the text. Where these begin with the BOS of a
    document, that one is enough, and the last position is padding.
    """
    place = _places(len(tokens), text_tokens(seq_len, context_bos))
    ids = np.append(tokens, 0).astype(tokens.dtype)  # the last one is the padding's
    if context_bos:
        place = np.concatenate([place[:, :1], place], axis=1)
        doubled = ids[place[:, 0]] == bos_id
        place[doubled] = np.pad(place[doubled, 1:], ((0, 0), (0, 1)), constant_values=-1)
    contexts = ids[place]
    if context_bos:
        contexts[:, 0] = bos_id
    return Packed(contexts, (place >= 0) & (contexts != (-1 if bos_id is None else bos_id)), place)


def _places(n: int, width: int) -> np.ndarray:
    """0 … n − 1 in rows of this width; the last row is filled up with −1."""
    return np.pad(np.arange(n), (0, -n % width), constant_values=-1).reshape(-1, width)


def tokenised(
    model: Tokenising, items: Iterable[tuple[Key, Sequence[Document]]]
) -> Iterator[tuple[Key, Int[np.ndarray, " tokens"]]]:
    """The token ids of each item's documents, BOS before each where its form wants it.

    Several items are read and tokenised together.

    A long text is tokenised in pieces, because the tokenizer's result takes hundreds of times the text's size.
    """
    for some in _at_once(items):
        ids = _token_ids(model, [document for _, documents in some for document in documents])
        for key, documents in some:
            yield key, np.concatenate([next(ids) for _ in documents])


def _token_ids(model: Tokenising, documents: Sequence[Document]) -> Iterator[Int[np.ndarray, " tokens"]]:
    plain = _encoded(model.tokenizer, [d.text for d in documents if d.form == "text"])
    marked = [d.text for d in documents if d.form in ("special", "chat")]
    special = _encoded(model.special_tokenizer, marked) if marked else iter(())
    for document in documents:
        if document.ids is not None:
            yield document.ids
        else:
            ids = next(plain if document.form == "text" else special)
            yield np.concatenate([_bos_before(ids, document.form, model.bos_id), ids])


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    pieces = [list(pieces_of(tokenizer, text, PIECE_CHARACTERS)) for text in texts]
    encodings = iter(tokenizer.encode_batch_fast([p for mine in pieces for p in mine], add_special_tokens=False))
    return (np.concatenate([np.array(next(encodings).ids, np.uint32) for _ in mine]) for mine in pieces)


def _bos_before(ids: np.ndarray, form: Form, bos_id: int | None) -> np.ndarray:
    """The BOS to put before a document: one or none."""
    none = bos_id is None or form == "chat" or (form == "special" and ids[:1].tolist() == [bos_id])
    return np.array([] if none else [bos_id], np.uint32)


def _at_once(items: Iterable[tuple[Key, Sequence[Document]]]) -> Iterator[list[tuple[Key, Sequence[Document]]]]:
    pending: list[tuple[Key, Sequence[Document]]] = []
    characters = 0
    for key, documents in items:
        pending.append((key, documents))
        characters += sum(len(document.text) for document in documents)
        if len(pending) >= TOKENISE_DOCUMENTS or characters >= TOKENISE_CHARACTERS:
            yield pending
            pending, characters = [], 0
    yield pending
