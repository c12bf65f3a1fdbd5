"""Text sources: files, directories, Hugging Face datasets and the embedded default, as a stream of documents."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from sae.documents import Document, TextReport, shuffled

COMPRESSION = {".xz": lzma.open, ".gz": gzip.open, ".zst": None}
DOMAIN_OF_SUFFIX = {".txt": "text", ".md": "markdown", ".py": "python"}
SUFFIXES = (*DOMAIN_OF_SUFFIX, ".jsonl")


class TextError(ValueError):
    """A text source cannot be read; the message says what was found and what is accepted."""


@dataclass
class TextSource:
    """A re-readable stream of documents: `documents()` starts over each time, in the same shuffled order."""

    name: str
    read: Callable[[TextReport], Iterator[Document]]
    fingerprint: str
    report: TextReport = field(default_factory=TextReport)

    def documents(self) -> Iterator[Document]:
        """Every non-empty document once, in a fixed shuffled order.

        Raises: TextError when nothing readable is found, with the counts of what was skipped.
        """
        self.report = TextReport()
        yield from shuffled(self._counted())

    def _counted(self) -> Iterator[Document]:
        for document in self.read(self.report):
            if not document.text.strip():
                self.report.empty += 1
                self.report.note(f"{document.id} is empty")
                continue
            self.report.documents += 1
            self.report.text_bytes += len(document.text.encode("utf-8", "surrogatepass"))
            yield document
        if not self.report.documents:
            problems = "".join(f"\n  {problem}" for problem in self.report.first_problems)
            raise TextError(f"no text found in {self.name} ({self.report.summary()}){problems}")


def open_text(spec: str | Path) -> TextSource:
    """Resolves `default`, a file, a directory, a local Hugging Face dataset, or `owner/name` on the hub.

    Raises: TextError for a missing path or an unknown file type.
    """
    if str(spec) == "default":
        from sae import default_text

        return TextSource("default", default_text.read, default_text.fingerprint())
    path = Path(spec)
    if path.is_file():
        return _files([path], path.parent, str(spec))
    if path.is_dir():
        if (path / "state.json").is_file() or _has_parquet(path):
            return _local_dataset(path)
        return _files(sorted(p for p in path.rglob("*") if p.is_file()), path, str(spec))
    if str(spec).count("/") == 1 and not str(spec).startswith((".", "/", "~")):
        return _hub_dataset(str(spec))
    raise TextError(
        f"text source {str(spec)!r}: no such file or directory. Give a file or directory of "
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
    return TextSource(" + ".join(source.name for source in sources), read, joined.hexdigest())


# --- files -----------------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str | None:
    """The suffix that decides how a file is read, with compression looked through; None for other types."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _files(paths: list[Path], root: Path, name: str) -> TextSource:
    known = [path for path in paths if _kind(path)]
    if not known:
        found = ", ".join(sorted({path.suffix or "no suffix" for path in paths})) or "no files"
        raise TextError(
            f"no text files in {name}: found {found}; read are {', '.join(SUFFIXES)} (also .xz, .gz, .zst)."
        )

    def read(report: TextReport) -> Iterator[Document]:
        report.ignored_files = len(paths) - len(known)
        for path in known:
            yield from _read_file(path, path.relative_to(root).as_posix(), report)

    hashes = sha256()
    for path in known:
        hashes.update(path.relative_to(root).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hashes.update(block)
    return TextSource(name, read, hashes.hexdigest())


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import zstandard

        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            yield io.BufferedReader(stream)  # type: ignore[type-var]
    elif opener := COMPRESSION.get(suffix):
        with opener(path, "rb") as stream:
            yield stream
    else:
        with path.open("rb") as stream:
            yield stream


def _read_file(path: Path, name: str, report: TextReport) -> Iterator[Document]:
    kind = _kind(path)
    try:
        with _opened(path) as stream:
            if kind == ".jsonl":
                yield from _read_jsonl(stream, name, report)
            else:
                assert kind is not None
                yield Document(name, _decoded(stream.read(), name, report), DOMAIN_OF_SUFFIX[kind], name)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, OSError) as error:
        raise TextError(f"{path} cannot be read: {error}. Is the file complete?") from error


def _decoded(raw: bytes, name: str, report: TextReport) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.replaced_documents += 1
        report.note(f"{name}: byte {error.start:,} is not UTF-8")
        return raw.decode("utf-8-sig", errors="replace")


def _read_jsonl(stream: BinaryIO, name: str, report: TextReport) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(_decoded(line, where, report))
        except ValueError as error:
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

    if (path / "state.json").is_file():
        data: Any = datasets.load_from_disk(str(path))
    else:
        files = [str(p) for p in sorted(path.rglob("*.parquet"))]
        data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    hashes = sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        hashes.update(file.relative_to(path).as_posix().encode() + file.read_bytes())
    return TextSource(str(path), _records(data, path.name), hashes.hexdigest())


def _hub_dataset(name: str) -> TextSource:
    import datasets

    try:
        data = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub raises many kinds; all mean the same to the reader
        raise TextError(
            f"text source {name!r} is neither a path here nor a dataset that could be opened on the hub: {error}"
        ) from error
    return TextSource(name, _records(data, name), f"hub:{name}:{getattr(data, '_fingerprint', '')}")


def _records(data: Any, name: str) -> Callable[[TextReport], Iterator[Document]]:
    def read(report: TextReport) -> Iterator[Document]:
        for number, record in enumerate(data):
            if not isinstance(record.get("text"), str):
                raise TextError(f'dataset {name} has no string column "text"; its columns are {sorted(record)}.')
            yield _from_record(record, f"{name}#{number}", name)

    return read
