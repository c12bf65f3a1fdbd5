"""From documents to contexts: tokenised in pieces and packed end to end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

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
    model: Tokenising, items: Iterable[tuple[Key, Sequence[str]]]
) -> Iterator[tuple[Key, Int[np.ndarray, " tokens"]]]:
    """The token ids of each item's texts, a BOS before each text. Several items are read and tokenised together.

    A long text is tokenised in pieces, because the tokenizer's result takes hundreds of times the text's size.
    """
    bos = np.array([] if model.bos_id is None else [model.bos_id], np.uint32)
    for some in _at_once(items):
        pieces = [[list(pieces_of(model.tokenizer, text, PIECE_CHARACTERS)) for text in texts] for _, texts in some]
        encodings = iter(
            model.tokenizer.encode_batch_fast(
                [piece for texts in pieces for text in texts for piece in text], add_special_tokens=False
            )
        )
        for (key, _), texts in zip(some, pieces, strict=True):
            ids = [[bos, *(np.array(next(encodings).ids, np.uint32) for _ in text)] for text in texts]
            yield key, np.concatenate([part for text in ids for part in text])


def _at_once(items: Iterable[tuple[Key, Sequence[str]]]) -> Iterator[list[tuple[Key, Sequence[str]]]]:
    pending: list[tuple[Key, Sequence[str]]] = []
    characters = 0
    for key, texts in items:
        pending.append((key, texts))
        characters += sum(map(len, texts))
        if len(pending) >= TOKENISE_DOCUMENTS or characters >= TOKENISE_CHARACTERS:
            yield pending
            pending, characters = [], 0
    yield pending
