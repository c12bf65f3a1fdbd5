"""Text sources as streams of documents: files, directories, Hugging Face datasets and the default text."""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from sae.text.compressed import COMPRESSION, opened
from sae.text.documents import Document, TextReport, shuffled

DOMAIN_OF_SUFFIX = {".txt": "text", ".md": "markdown", ".py": "python"}
SUFFIXES = (*DOMAIN_OF_SUFFIX, ".jsonl")
MAX_DOCUMENT_CHARACTERS = 1 << 22
SAVED_DATASET = ("state.json", "dataset_dict.json")  # files that mark a directory written by datasets' save_to_disk


class TextError(ValueError):
    """A text source cannot be read; the message says what was found and what is accepted."""


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
    read: Callable[[TextReport], Iterator[Document]]
    fingerprint: str
    report: TextReport = field(default_factory=TextReport)
    specs: tuple[str, ...] = ()  # what to pass to `open_text` to open it again

    def documents(self) -> Iterator[Document]:
        """Every non-empty document once, in a fixed shuffled order.

        Raises: TextError when nothing readable is found, with the counts of what was skipped.
        """
        self.report = TextReport()
        yield from shuffled(self._counted())

    def _in_parts(self, document: Document) -> Iterator[Document]:
        """Cuts a text that is too long to tokenise at once, after line ends or spaces."""
        if len(document.text) <= MAX_DOCUMENT_CHARACTERS:
            yield document
            return
        self.report.long_documents += 1
        self.report.note(f"{document.id} has {len(document.text):,} characters and was cut into parts")
        start, number = 0, 0
        while start < len(document.text):
            end = _cut(document.text, start)
            yield replace(document, id=f"{document.id}#{number}", text=document.text[start:end], of=document.digest)
            start, number = end, number + 1

    def _counted(self) -> Iterator[Document]:
        for document in self.read(self.report):
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


def open_text(spec: str | Path) -> TextSource:
    """Opens `default`, a file, a directory, a local Hugging Face dataset, or the dataset `owner/name` of the hub.

    Raises: TextError for a missing path or an unknown file type.
    """
    return replace(_opened_source(spec), specs=(str(spec),))


def _opened_source(spec: str | Path) -> TextSource:
    if str(spec) == "default":
        from sae.text import default_corpus

        return TextSource("default", default_corpus.read, default_corpus.fingerprint())
    path = Path(spec)
    if path.is_file():
        return _files([path], path.parent, str(spec))
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED_DATASET) or _has_parquet(path):
            return _local_dataset(path)
        return _files(sorted(p for p in path.rglob("*") if p.is_file()), path, str(spec))
    if str(spec).count("/") == 1 and not str(spec).startswith((".", "/", "~")):
        return _hub_dataset(str(spec))
    raise TextError(
        f"text source {str(spec)!r}: no such file or directory. Use a file or directory of "
        f"{', '.join(SUFFIXES)} (also .xz, .gz, .zst), a dataset as owner/name, or 'default'."
    )


def combine(sources: list[TextSource]) -> TextSource:
    """Several sources as one; their documents are shuffled together."""
    if len(sources) == 1:
        return sources[0]

    def read(report: TextReport) -> Iterator[Document]:
        for source in sources:
            yield from source.read(report)

    joined = sha256("\n".join(source.fingerprint for source in sources).encode())
    specs = tuple(spec for source in sources for spec in source.specs)
    return TextSource(" + ".join(source.name for source in sources), read, joined.hexdigest(), specs=specs)


# --- files -----------------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str | None:
    """The suffix that decides how a file is read, without that of compression; None for other types."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _files(paths: list[Path], root: Path, name: str) -> TextSource:
    known = [path for path in paths if _kind(path)]
    if not known:
        found = ", ".join(sorted({path.suffix or "no suffix" for path in paths})) or "no files"
        raise TextError(
            f"no text files in {name}: found {found}, expected {', '.join(SUFFIXES)} (also .xz, .gz, .zst)."
        )

    def read(report: TextReport) -> Iterator[Document]:
        report.ignored_files += len(paths) - len(known)
        for path in known:
            yield from _read_file(path, path.relative_to(root).as_posix(), report)

    return TextSource(name, read, _hash_of(known, root))


def _hash_of(paths: list[Path], root: Path) -> str:
    """SHA-256 over the path of each file below `root` and its bytes."""
    hashes = sha256()
    for path in paths:
        hashes.update(path.relative_to(root).as_posix().encode("utf-8", "surrogateescape") + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hashes.update(block)
    return hashes.hexdigest()


def _read_file(path: Path, name: str, report: TextReport) -> Iterator[Document]:
    kind = _kind(path)
    try:
        with opened(path) as stream:
            if kind == ".jsonl":
                yield from read_jsonl(stream, name, report)
            else:
                assert kind is not None
                yield Document(name, _decoded(stream.read(), name, report), DOMAIN_OF_SUFFIX[kind], name)
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise TextError(f"{path} cannot be read: {error}. Is the file complete?") from error


def _decoded(raw: bytes, name: str, report: TextReport) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.replaced_documents += 1
        report.note(f"{name}: byte {error.start:,} is not UTF-8")
        return raw.decode("utf-8-sig", errors="replace")


def read_jsonl(stream: BinaryIO, name: str, report: TextReport) -> Iterator[Document]:
    """One document per line, from its "text" (and "id", "domain", "source"); broken lines are counted and skipped."""
    for number, line in enumerate(stream, start=1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(_decoded(line, where, report))
        except (ValueError, RecursionError) as error:
            report.broken_lines += 1
            report.note(f"{where}: {error}")
            continue
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            report.broken_lines += 1
            report.note(f'{where}: no string under "text"')
            continue
        yield _from_record(record, where, name)


def _from_record(record: dict[str, Any], where: str, default_source: str) -> Document:
    return Document(
        str(record.get("id") or where),
        record["text"],
        str(record.get("domain") or "text"),
        str(record.get("source") or default_source),
    )


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


def _has_parquet(path: Path) -> bool:
    return any(path.rglob("*.parquet"))


def _local_dataset(path: Path) -> TextSource:
    import datasets

    files = sorted(p for p in path.rglob("*") if p.is_file())
    try:
        if any((path / name).is_file() for name in SAVED_DATASET):
            data: Any = datasets.load_from_disk(str(path))
        else:
            parquet = [str(p) for p in files if p.suffix == ".parquet"]
            data = datasets.load_dataset("parquet", data_files=parquet, split="train", streaming=True)
    except Exception as error:  # the library raises many types of error
        raise TextError(f"{path} looks like a saved dataset but cannot be opened: {error}") from error
    if isinstance(data, dict):
        if "train" not in data:
            raise TextError(f"{path} has the splits {sorted(data)} and no 'train'. Use the directory of one split.")
        data = data["train"]
    return TextSource(str(path), _records(data, path.name), _hash_of(files, path))


def _hub_dataset(name: str) -> TextSource:
    import datasets

    try:
        data = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub raises many types of error; all mean the same here
        raise TextError(
            f"text source {name!r} is neither a path here nor a dataset that could be opened on the hub: {error}"
        ) from error
    return TextSource(name, _records(data, name), f"hub:{name}:{getattr(data, '_fingerprint', '')}")


def _records(data: Any, name: str) -> Callable[[TextReport], Iterator[Document]]:
    """A reader of the column "text". Raises: TextError if there is no such column, as soon as that is known."""

    def require_text(columns: Iterable[str]) -> None:
        if "text" not in columns:
            raise TextError(f'dataset {name} has no column "text"; its columns are {sorted(columns)}.')

    if getattr(data, "column_names", None) is not None:
        require_text(data.column_names)

    def read(report: TextReport) -> Iterator[Document]:
        where = f"{name}#0"
        try:
            for number, record in enumerate(data):
                where = f"{name}#{number}"
                require_text(record)
                if isinstance(record["text"], str):
                    yield _from_record(record, where, name)
                else:
                    report.broken_lines += 1
                    report.note(f'{where}: no string under "text"')
        except TextError:
            raise
        except Exception as error:  # a damaged file or a lost connection; each library has its own errors
            raise TextError(f"dataset {name} cannot be read after {where}: {error}") from error

    return read
