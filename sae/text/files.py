"""Text in files: which files of a directory are read, which are not and why, and the documents in each."""

from __future__ import annotations

import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count, islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from sae.text.columns import ABOUT_A_RECORD, NAMES, TEXT, Column, ColumnError, column_of, document_in, kinds_of
from sae.text.compressed import COMPRESSION, opened
from sae.text.documents import Document, RawDocument, TextError, TextReport

DOMAIN_OF_SUFFIX = {".txt": "text", ".md": "markdown", ".py": "python"}
SUFFIXES = (*DOMAIN_OF_SUFFIX, ".jsonl", ".parquet")
READABLE = f"{', '.join(SUFFIXES)} (all but .parquet also with .xz, .gz or .zst)"
LINES_LOOKED_AT = 100  # of a .jsonl file, to find the key that holds the text
# The words by which the Hugging Face Hub finds splits in the names of files and folders.
HELD_BACK_WORDS = {
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "dev", "val"},
}
TRAIN_WORDS = {"train", "training"}
BROKEN = object()  # in place of what a line holds
BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")


@dataclass
class Files:
    """The files of a source: those to read, each with its column, and how many are not read, by the reason."""

    root: Path
    name: str
    found: list[Path]  # every plain file, in order
    columns: dict[Path, Column] = field(default_factory=dict)
    not_read: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def read(self, report: TextReport) -> Iterator[Document | RawDocument]:
        """The documents of every file to read; a row of Parquet is named by its number in all such files together."""
        report.not_read += self.not_read
        for problem in self.problems:
            report.note(problem)
        rows = count()
        for path, column in self.columns.items():
            if _kind(path) == ".parquet":
                for record, row in zip(_rows(path, column), rows):  # noqa: B905 (the numbers do not end)
                    yield from document_or_count(record, column, f"{self.name}#{row}", self.name, report)
            else:
                yield from _read_file(path, path.relative_to(self.root).as_posix(), column, report)

    def fingerprint(self) -> str:
        """SHA-256 over the path of each file that is read, and its bytes; other columns than "text" are part of it."""
        read = list(self.columns)
        columns = "".join(f"{p.relative_to(self.root)}\0{c.name}\0" for p, c in self.columns.items() if c != TEXT)
        if not any(map(_is_parquet, read)):
            return hash_of(read, self.root, columns)
        # Version 0.1 read nothing but Parquet in such a directory, and hashed all files: the same where that is so now.
        others = (p for p in self.found if p not in self.columns and not _is_card(p))
        if all(map(_is_parquet, read)) and not any(map(_kind, others)):
            return hash_of(self.found, self.root, columns)
        return hash_of(read, self.root, f"Parquet among other files\0{columns}")


def list_files(path: Path, name: str, asked: str | None = None) -> Files:
    """What is read of a file or a directory. `asked` names the column of records that holds the text.

    In a directory, .parquet and .jsonl files of the splits test and validation are left out, and .txt files of these
    splits if there is a split train. A Parquet file without text is an error, but only counted where it may be
    a fixture: beside other files that are read, and not called train.
    Raises: TextError if nothing can be read.
    """
    files = Files(path.parent, path.name, [path]) if path.is_file() else _walk(path)
    readable = [found for found in files.found if _kind(found)]
    for found in files.found:
        if not _kind(found):
            files.not_read[found.suffix or "no suffix"] += 1
    if path.is_dir():
        readable = _without_held_back(files, readable)
    unusable: list[tuple[Path, str]] = []
    for found in readable:
        try:
            files.columns[found] = _column(found, asked)
        except ValueError as error:  # of a column, or of a file that is not Parquet
            unusable.append((found, str(error)))
    for found, reason in unusable:
        where = found.relative_to(files.root)
        if not files.columns or _split(where) == "train":
            raise TextError(f"{found} {reason}.")
        files.not_read[f"{found.suffix} without text"] += 1
        files.problems.append(f"{where.as_posix()} {reason}")
    if not files.columns:
        raise TextError(_nothing_in(name, files))
    return files


def _walk(root: Path) -> Files:
    """Every file below a directory. Links to directories are not followed."""

    def refuse(error: OSError) -> None:
        raise TextError(f"{error.filename} cannot be read: {error.strerror}.") from error

    files = Files(root, root.name, [])
    for folder, folders, names in os.walk(root, onerror=refuse):
        files.not_read["linked directories"] += sum(Path(folder, name).is_symlink() for name in folders)
        for path in (Path(folder, name) for name in names):
            if path.is_file():
                files.found.append(path)
            else:
                files.not_read["broken links or special files"] += 1
    files.found.sort()
    files.not_read = +files.not_read
    return files


def _without_held_back(files: Files, readable: list[Path]) -> list[Path]:
    """The files without those of a test or validation split, and without the data set's card."""
    splits = {path: _split(path.relative_to(files.root)) for path in readable}
    tables = [path for path in readable if _kind(path) in (".parquet", ".jsonl")]
    named = tables + [path for path in readable if _kind(path) == ".txt"]
    if not any(splits[path] == "train" for path in named):
        named = tables
    has_parquet = any(map(_is_parquet, readable))
    kept = []
    for path in readable:
        if has_parquet and _is_card(path):
            files.not_read["card of a data set"] += 1
        elif path in named and splits[path] in HELD_BACK_WORDS:
            files.not_read[f"{_kind(path)} of the split {splits[path]}"] += 1
        else:
            kept.append(path)
    return kept


def _split(path: PurePath) -> str | None:
    """The split that the name of a file, or else of its nearest folder, says: test, validation, train or None."""
    for part in reversed(path.parts):
        words = set(BETWEEN_WORDS.split(part.lower()))
        for split, its_words in (HELD_BACK_WORDS | {"train": TRAIN_WORDS}).items():
            if words & its_words:
                return split
    return None


def _nothing_in(name: str, files: Files) -> str:
    found = ", ".join(sorted(files.not_read)) or "no files"
    hint = " Name the file or folder of a split to read it." if " of the split " in found else ""
    return f"no text files in {name}: found {found}, expected {READABLE}.{hint}"


def _kind(path: Path) -> str | None:
    """The suffix that decides how a file is read, without that of compression; None for other types."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":  # Parquet is read from its end
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _is_parquet(path: Path) -> bool:
    return _kind(path) == ".parquet"


def _is_card(path: Path) -> bool:
    """Whether a file is the card of a data set: a README.md with settings at its head."""
    if path.name != "README.md":
        return False
    with path.open("rb") as file:
        return file.read(4).startswith(b"---")


def hash_of(paths: list[Path], root: Path, columns: str = "") -> str:
    """SHA-256 over the path of each file below `root` and its bytes, then over `columns`."""
    hashes = sha256()
    for path in paths:
        hashes.update(path.relative_to(root).as_posix().encode("utf-8", "surrogateescape") + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hashes.update(block)
    hashes.update(columns.encode("utf-8", "surrogateescape"))
    return hashes.hexdigest()


# --- one file --------------------------------------------------------------------------------------------------------


def _column(path: Path, asked: str | None) -> Column:
    """Where a file's text is. Raises: ColumnError or ParquetError if a Parquet file has none."""
    if _is_parquet(path):
        from sae.text.parquet import kinds_in

        return column_of(kinds_in(path), asked)
    if _kind(path) != ".jsonl":
        return TEXT
    try:
        return column_of(kinds_of(_first_records(path)), asked)
    except ColumnError:
        return Column(asked or "text", "text")  # its lines are counted as broken


def _first_records(path: Path) -> Iterator[dict[str, Any]]:
    unreported = TextReport()
    with _readable(path) as stream:
        for line in islice(stream, LINES_LOOKED_AT):
            record = _record(line, "", unreported)
            if isinstance(record, dict):
                yield record


@contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    try:
        with opened(path) as stream:
            yield stream
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise TextError(f"{path} cannot be read: {error}. Is the file complete?") from error


def _read_file(path: Path, name: str, column: Column, report: TextReport) -> Iterator[Document | RawDocument]:
    kind = _kind(path)
    with _readable(path) as stream:
        if kind == ".jsonl":
            yield from read_jsonl(stream, name, report, column)
        else:
            assert kind is not None
            yield Document(name, _decoded(stream.read(), name, report), DOMAIN_OF_SUFFIX[kind], name)


def _rows(path: Path, column: Column) -> Iterator[dict[str, Any]]:
    from sae.text.parquet import ParquetError, rows_in

    try:
        yield from rows_in(path, (column.name, *ABOUT_A_RECORD))
    except ParquetError as error:
        raise TextError(f"{path} cannot be read: {error}. Is the file complete?") from error


def _decoded(raw: bytes, name: str, report: TextReport) -> str:
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        report.replaced_documents += 1
        report.note(f"{name}: byte {error.start:,} is not {'UTF-16' if encoding == 'utf-16' else 'UTF-8'}")
        return raw.decode(encoding, errors="replace")


def read_jsonl(
    stream: BinaryIO, name: str, report: TextReport, column: Column = TEXT
) -> Iterator[Document | RawDocument]:
    """One document per line, from its "text" (and "id", "domain", "source"); broken lines are counted and skipped."""
    for number, line in enumerate(stream, start=1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        record = _record(line, where, report)
        if record is not BROKEN:
            yield from document_or_count(record, column, where, name, report)


def _record(line: bytes, where: str, report: TextReport) -> Any:
    """The value on a line of JSON; BROKEN, counted, if it cannot be read."""
    try:
        return json.loads(_decoded(line, where, report))
    except (ValueError, RecursionError) as error:
        report.broken_lines += 1
        report.note(f"{where}: {error}")
        return BROKEN


def document_or_count(
    record: Any, column: Column, where: str, default_source: str, report: TextReport
) -> Iterator[Document | RawDocument]:
    """The document of a record; or none, counted."""
    document = document_in(record, column, where, default_source) if isinstance(record, dict) else None
    if document is not None:
        yield document
        return
    report.broken_lines += 1
    report.note(f'{where}: no {NAMES[column.kind]} under "{column.name}"')
