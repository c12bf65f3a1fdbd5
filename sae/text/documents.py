"""Documents, and the rule that assigns each to a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from store.common import HELD_OUT, TRAIN, DocumentRecord

HELD_OUT_MODULUS = 20
DOCUMENT_BYTES = 500  # overhead of a document in memory, which counts when they are short and many


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

    @property
    def digest(self) -> int:
        """Decides the split: the digest of the text, or of the whole text that this is a part of."""
        return digest_of(self.text) if self.of is None else self.of

    @property
    def split(self) -> str:
        """ "heldout" or "train"."""
        return _split(self.digest)


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
        held_bytes += len(raw) + DOCUMENT_BYTES
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
    ignored_files: int = 0
    duplicates: int = 0
    long_documents: int = 0
    first_problems: list[str] = field(default_factory=list)

    def note(self, problem: str) -> None:
        if len(self.first_problems) < 5:
            self.first_problems.append(problem)

    def summary(self) -> str:
        parts = [f"{self.documents:,} documents, {self.text_bytes / 1e6:.1f} MB"]
        for count, what in (
            (self.empty, "empty"),
            (self.broken_lines, "broken jsonl lines"),
            (self.replaced_documents, "with undecodable bytes (shown as U+FFFD)"),
            (self.ignored_files, "files of other types ignored"),
            (self.duplicates, "exact duplicates dropped"),
            (self.long_documents, "too long and cut into parts"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        return "; ".join(parts)
