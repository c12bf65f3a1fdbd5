"""Documents, and the rule that assigns each to a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from store.common import HELD_OUT, TRAIN, DocumentRecord

HELD_OUT_MODULUS = 20
DOCUMENT_BYTES = 500  # overhead of a document in memory, which counts when they are short and many


class TextError(ValueError):
    """A text source cannot be read; the message says what was found and what is accepted."""


# How a document becomes token ids.
# "text": nothing in it is a special token, and BOS is put before it.
# "special": special tokens in it are read as such, and BOS is put before it unless it begins with it.
# "chat": as "special", with no BOS but that of the template.
# "ids": its token ids are given, and used as they are.
Form = Literal["text", "special", "chat", "ids"]


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its origin; `id` is the same in each run over the same source.

    A part of a longer text has the digest of the whole text in `of`, so all parts are in the split of the whole.
    """

    id: str
    text: str
    domain: str
    source: str
    of: int | None = None
    form: Form = "text"
    ids: np.ndarray | None = field(default=None, compare=False)  # uint32; only of the form "ids"

    @property
    def digest(self) -> int:
        """Decides the split: the digest of the text, or of the whole text that this is a part of."""
        return digest_of(self.text) if self.of is None else self.of

    @property
    def split(self) -> str:
        """ "heldout" or "train"."""
        return _split(self.digest)


@dataclass(frozen=True, slots=True)
class RawDocument:
    """A record whose text depends on the model: chat messages, or token ids (`sae.text.model_text` reads them)."""

    id: str
    kind: Literal["messages", "input_ids"]
    content: list[Any]
    domain: str
    source: str


def digest_of(text: str) -> int:
    """64-bit blake2b of the text's UTF-8 bytes (lone surrogates included)."""
    return int.from_bytes(blake2b(_utf8(text), digest_size=8).digest(), "big")


def split_of(text: str) -> str:
    """`heldout` when `blake2b(text) mod 20 == 0`, else `train`: a function of the text alone."""
    return _split(digest_of(text))


def _split(digest: int) -> str:
    return HELD_OUT if digest % HELD_OUT_MODULUS == 0 else TRAIN


def sha256_of(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, in hexadecimal."""
    from hashlib import sha256

    return sha256(_utf8(text)).hexdigest()


def record_of(document: Document) -> DocumentRecord:
    """What a store keeps of a document."""
    return DocumentRecord(document.id, document.source, document.domain, sha256_of(document.text))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def shuffled(documents: Iterator[Document], *, window_bytes: int = 1 << 29) -> Iterator[Document]:
    """The documents in an order that depends only on their texts, window by window.

    Sources are often sorted by topic (a corpus by domain, a directory by name), and a budget smaller than the source
    would see only its beginning. Within a window the order is that of a second hash: a fixed shuffle. Text of
    up to `window_bytes` (UTF-8 and overhead) is one window; longer text is shuffled in bounded memory.
    """
    window: list[tuple[bytes, Document]] = []
    held_bytes = 0
    for document in documents:
        raw = _utf8(document.text)
        window.append((blake2b(raw, digest_size=8, person=b"order").digest(), document))
        held_bytes += len(raw) + DOCUMENT_BYTES + (0 if document.ids is None else document.ids.nbytes)
        if held_bytes >= window_bytes:
            yield from _in_order(window)
            window, held_bytes = [], 0
    yield from _in_order(window)


def _in_order(window: list[tuple[bytes, Document]]) -> Iterator[Document]:
    return (document for _, document in sorted(window, key=lambda pair: (pair[0], pair[1].id)))


@dataclass
class TextReport:
    """Counts of what a reader found; nothing is skipped without being counted here."""

    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    broken_lines: int = 0
    replaced_documents: int = 0
    not_read: Counter[str] = field(default_factory=Counter)  # files by the reason, such as ".csv"
    duplicates: int = 0
    long_documents: int = 0
    first_problems: list[str] = field(default_factory=list)

    @property
    def ignored_files(self) -> int:
        """Number of files that were not read."""
        return self.not_read.total()

    def clear(self) -> None:
        """Sets every count to zero."""
        vars(self).update(vars(TextReport()))

    def note(self, problem: str) -> None:
        if len(self.first_problems) < 5:
            self.first_problems.append(problem)

    def summary(self) -> str:
        parts = [f"{self.documents:,} documents, {self.text_bytes / 1e6:.1f} MB"]
        for count, what in (
            (self.empty, "empty"),
            (self.broken_lines, "broken jsonl lines or records without text"),
            (self.replaced_documents, "with undecodable bytes (shown as U+FFFD)"),
            (self.ignored_files, f"files not read ({_counted(self.not_read)})"),
            (self.duplicates, "exact duplicates dropped"),
            (self.long_documents, "too long and cut into parts"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        return "; ".join(parts)


def _counted(reasons: Counter[str]) -> str:
    """`3 .csv, 1 of the split test`, the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda r: (-r[1], r[0])))
