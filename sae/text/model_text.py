"""Records whose text depends on the model: chat messages through its template, and token ids of its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from sae.text.documents import Document, RawDocument, TextError

CHECKED_DOCUMENTS = 64
EDGE_TOKENS = 2  # at each end of a text, not counted: a chunk may begin or end inside a word
# Of a sample's token ids, at least this share must come back from their own text. With the right tokenizer nearly all
# do; read as another byte-level BPE's they spell common words too, but often not as that tokenizer would.
LEAST_AGREEMENT = 0.95

Messages = Sequence[Mapping[str, Any]]


class ModelText(Protocol):
    """What reading such records needs of a language model."""

    id: str

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def special_tokenizer(self) -> Tokenizer: ...
    @property
    def bos_id(self) -> int | None: ...
    def chat_text(self, messages: Messages, *, reply: bool = False) -> str: ...


class RecordError(TextError):
    """One record cannot be read; others may be."""


@dataclass(frozen=True)
class Agreement:
    """Token ids of a sample, decoded and encoded again: how many documents, and the share of ids that came back."""

    documents: int
    share: float


def document_of(raw: RawDocument, model: ModelText) -> Document:
    """A record as a document of this model. Raises: RecordError naming the record and what is wrong."""
    if raw.kind == "messages":
        try:
            text = model.chat_text(raw.content) if raw.content else ""
        except ValueError as error:
            raise RecordError(f"{raw.id}: {error}") from error
        return Document(raw.id, text, raw.domain, raw.source, form="chat")
    ids = _checked_ids(raw, model.tokenizer)
    return Document(raw.id, _decoded(ids, model), raw.domain, raw.source, form="ids", ids=ids)


def agreement(raws: Iterable[RawDocument], model: ModelText) -> Agreement | None:
    """Decodes the token ids of the first records and encodes them again; counts how many come back, in any order.

    None without records. Raises: TextError if they are another tokenizer's, or if an id of any record is no token.
    """
    given: list[np.ndarray] = []
    for raw in raws:
        ids = _checked_ids(raw, model.tokenizer)
        if len(given) < CHECKED_DOCUMENTS:
            given.append(ids)
    if not given:
        return None
    texts = [_decoded(ids, model) for ids in given]
    again = model.special_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    inner = [Counter(ids[EDGE_TOKENS:-EDGE_TOKENS].tolist()) for ids in given]
    came_back = sum((ids & Counter(found.ids)).total() for ids, found in zip(inner, again, strict=True))
    counted = sum(ids.total() for ids in inner)
    share = came_back / counted if counted else 1.0
    if share < LEAST_AGREEMENT:
        raise TextError(
            f"the token ids were not made with the tokenizer of {model.id}: of a sample's ids, decoded and encoded "
            f"again, {share:.1%} came back, expected at least {LEAST_AGREEMENT:.0%}. Give the text itself instead."
        )
    return Agreement(len(given), share)


def _checked_ids(raw: RawDocument, tokenizer: Tokenizer) -> np.ndarray:
    """The ids as uint32. Raises: TextError for one that is no token."""
    for token in sorted(set(raw.content)):
        if not 0 <= token < 1 << 32 or tokenizer.id_to_token(token) is None:
            raise TextError(
                f"{raw.id}: {token} is not a token id of this model, whose tokenizer has "
                f"{tokenizer.get_vocab_size():,} tokens. Were the ids made with another tokenizer? Give the text "
                "itself instead."
            )
    return np.array(raw.content, np.uint32)


def _decoded(ids: np.ndarray, model: ModelText) -> str:
    """The text of token ids without a BOS at its beginning, so that it is in the same split as the text itself."""
    listed = ids.tolist()
    return model.tokenizer.decode(listed[listed[:1] == [model.bos_id] :], skip_special_tokens=False)
