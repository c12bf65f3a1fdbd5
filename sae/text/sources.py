"""Text sources as streams of documents: files, directories, Hugging Face datasets and the default text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from sae.text.columns import NAMES, ColumnError, Kind, column_of, kinds_of
from sae.text.documents import Document, RawDocument, TextReport, shuffled
from sae.text.documents import TextError as TextError
from sae.text.files import READABLE, Files, document_or_count, hash_of, list_files
from sae.text.model_text import CHECKED_DOCUMENTS, Agreement, ModelText, RecordError, agreement, document_of

MAX_DOCUMENT_CHARACTERS = 1 << 22
LOOKED_AT = 10_000  # records, to refuse those that the model cannot read before anything is written
SAVED_DATASET = ("state.json", "dataset_dict.json")  # files that mark a directory written by datasets' save_to_disk


def _cut(text: str, start: int) -> int:
    """Where the part from `start` ends: after the last line end in its second half, or else the last space."""
    limit = start + MAX_DOCUMENT_CHARACTERS
    if limit >= len(text):
        return len(text)
    half = start + MAX_DOCUMENT_CHARACTERS // 2
    return text.rfind("\n", half, limit) + 1 or text.rfind(" ", half, limit) + 1 or limit


@dataclass
class TextSource:
    """A stream of documents that can be read again: each call of `documents()` gives the same shuffled order."""

    name: str
    read: Callable[[TextReport], Iterator[Document | RawDocument]]
    fingerprint: str
    report: TextReport = field(default_factory=TextReport)
    specs: tuple[str, ...] = ()  # what to pass to `open_text` to open it again
    column: str | None = None  # the column asked for
    kinds: frozenset[Kind] = frozenset()  # what its records hold, if it has any
    special_tokens: bool = False  # whether special tokens in texts are read as such
    model: ModelText | None = None  # whose chat template and tokenizer read what only a model can
    agreement: Agreement | None = None  # of its token ids with that tokenizer

    def for_model(self, model: ModelText) -> TextSource:
        """The same text as this model reads it: chat messages through its template, token ids as its tokenizer's.

        The first records are read at once. Raises: TextError when the model has no chat template, when its template
        refuses every conversation among them, or when the token ids are another tokenizer's.
        """
        chats = list(islice(self._sample("messages"), CHECKED_DOCUMENTS))
        refused = [error for raw in chats if (error := _refusal(raw, model))]
        if chats and len(refused) == len(chats):
            raise TextError(f"{self.name} holds chat messages: {refused[0]}")
        return replace(self, model=model, agreement=agreement(self._sample("input_ids"), model))

    def _sample(self, kind: Kind) -> Iterator[RawDocument]:
        """Records of one kind among the first; where there are none, nothing is read."""
        if kind in self.kinds:
            for raw in islice(self.read(TextReport()), LOOKED_AT):
                if isinstance(raw, RawDocument) and raw.kind == kind:
                    yield raw

    def documents(self) -> Iterator[Document]:
        """Every non-empty document once, in a fixed shuffled order.

        Raises: TextError when nothing readable is found, with the counts of what was skipped.
        """
        self.report.clear()
        yield from shuffled(self._counted())

    def _in_parts(self, document: Document) -> Iterator[Document]:
        """Cuts a text that is too long to tokenise at once, after line ends or spaces."""
        if len(document.text) <= MAX_DOCUMENT_CHARACTERS or document.ids is not None:
            yield document
            return
        self.report.long_documents += 1
        self.report.note(f"{document.id} has {len(document.text):,} characters and was cut into parts")
        start, number = 0, 0
        while start < len(document.text):
            end = _cut(document.text, start)
            yield replace(document, id=f"{document.id}#{number}", text=document.text[start:end], of=document.digest)
            start, number = end, number + 1

    def _as_document(self, found: Document | RawDocument) -> Document:
        if isinstance(found, Document):
            return replace(found, form="special") if self.special_tokens else found
        if self.model is None:
            raise TextError(
                f"{self.name} holds {NAMES[found.kind]}, which only an existing model's tokenizer can read; this "
                "command makes its own. Give text."
            )
        return document_of(found, self.model)

    def _counted(self) -> Iterator[Document]:
        for found in self.read(self.report):
            try:
                document = self._as_document(found)
            except RecordError as error:
                self.report.broken_lines += 1
                self.report.note(str(error))
                continue
            if not document.text.strip():
                self.report.empty += 1
                self.report.note(f"{document.id} is empty")
                continue
            try:
                text_bytes = len(document.text.encode())
            except UnicodeEncodeError:  # lone surrogates, which JSON can express and no tokenizer accepts
                self.report.replaced_documents += 1
                self.report.note(f"{document.id} holds lone surrogates")
                paired = document.text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                document, text_bytes = replace(document, text=paired), len(paired.encode())
            self.report.documents += 1
            self.report.text_bytes += text_bytes
            yield from self._in_parts(document)
        if not self.report.documents:
            problems = "".join(f"\n  {problem}" for problem in self.report.first_problems)
            raise TextError(f"no text found in {self.name} ({self.report.summary()}){problems}")


def open_text(spec: str | Path, *, column: str | None = None) -> TextSource:
    """Opens `default`, a file, a directory, a local Hugging Face dataset, or the dataset `owner/name` of the hub.

    `column` names the column of tables, or the key of JSON lines, that holds the text; else it is "text", or the only
    one that can be meant.
    Raises: TextError for a missing path, an unknown file type, or records in which no column holds the text.
    """
    source = replace(_opened_source(spec, column), specs=(str(spec),), column=column)
    if column is not None:
        source.fingerprint = sha256(f"{source.fingerprint}\0{column}".encode()).hexdigest()
    return source


def _opened_source(spec: str | Path, column: str | None) -> TextSource:
    if str(spec) == "default":
        from sae.text import default_corpus

        return TextSource("default", default_corpus.read, default_corpus.fingerprint())
    path = Path(spec)
    if path.is_dir() and any((path / name).is_file() for name in SAVED_DATASET):
        return _saved_dataset(path, column)
    if path.is_dir() or path.is_file():
        files = list_files(path, str(spec), column)
        return TextSource(str(spec), files.read, files.fingerprint(), kinds=_kinds(files))
    if str(spec).count("/") == 1 and not str(spec).startswith((".", "/", "~")):
        return _hub_dataset(str(spec), column)
    raise TextError(
        f"text source {str(spec)!r}: no such file or directory. Use a file or directory of {READABLE}, a dataset as "
        "owner/name, or 'default'."
    )


def _kinds(files: Files) -> frozenset[Kind]:
    return frozenset(column.kind for column in files.columns.values())


def _refusal(raw: RawDocument, model: ModelText) -> RecordError | None:
    try:
        document_of(raw, model)
    except RecordError as error:
        return error
    return None


def combine(sources: list[TextSource]) -> TextSource:
    """Several sources as one; their documents are shuffled together."""
    if len(sources) == 1:
        return sources[0]

    def read(report: TextReport) -> Iterator[Document | RawDocument]:
        for source in sources:
            yield from source.read(report)

    if len({source.column for source in sources}) > 1:
        raise TextError(f"{' + '.join(source.name for source in sources)}: name one text column for all of them.")
    joined = sha256("\n".join(source.fingerprint for source in sources).encode())
    specs = tuple(spec for source in sources for spec in source.specs)
    kinds = frozenset[Kind]().union(*(source.kinds for source in sources))
    name = " + ".join(source.name for source in sources)
    return TextSource(name, read, joined.hexdigest(), specs=specs, column=sources[0].column, kinds=kinds)


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


def _saved_dataset(path: Path, asked: str | None) -> TextSource:
    import datasets

    try:
        data: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many types of error
        raise TextError(f"{path} looks like a saved dataset but cannot be opened: {error}") from error
    others: list[str] = []
    if isinstance(data, dict):
        if "train" not in data:
            raise TextError(f"{path} has the splits {sorted(data)} and no 'train'. Use the directory of one split.")
        others = sorted(data.keys() - {"train"})
        data = data["train"]
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return _dataset(data, path.name, str(path), hash_of(files, path), asked, others)


def _hub_dataset(name: str, asked: str | None) -> TextSource:
    import datasets

    try:
        data = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub raises many types of error; all mean the same here
        raise TextError(
            f"text source {name!r} is neither a path here nor a dataset that could be opened on the hub: {error}"
        ) from error
    return _dataset(data, name, name, f"hub:{name}:{getattr(data, '_fingerprint', '')}", asked)


def _dataset(
    data: Any, label: str, name: str, fingerprint: str, asked: str | None, other_splits: list[str] | None = None
) -> TextSource:
    """The rows of a dataset of Hugging Face's library. Raises: TextError when no column holds the text."""
    try:
        column = column_of(_kinds_in(data), asked)
    except ColumnError as error:
        raise TextError(f"dataset {label} {error}.") from error
    except Exception as error:  # the connection is lost; each library has its own errors
        raise TextError(f"dataset {label} cannot be read: {error}") from error

    def read(report: TextReport) -> Iterator[Document | RawDocument]:
        report.not_read.update(f"split {split} of a data set" for split in other_splits or [])
        where = f"{label}#0"
        try:
            for number, record in enumerate(data):
                where = f"{label}#{number}"
                yield from document_or_count(record, column, where, label, report)
        except TextError:
            raise
        except Exception as error:  # a damaged file or a lost connection; each library has its own errors
            raise TextError(f"dataset {label} cannot be read after {where}: {error}") from error

    return TextSource(name, read, fingerprint, kinds=frozenset({column.kind}))


def _kinds_in(data: Any) -> dict[str, Kind | None]:
    if getattr(data, "features", None) is None:  # streamed, without a schema
        return kinds_of(islice(data, 1))
    from sae.text.parquet import kinds_of_schema

    return kinds_of_schema(data.features.arrow_schema)
