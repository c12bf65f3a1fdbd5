"""The default text: source code and documentation of installed packages, and six domains generated from a seed.

Measured with Python 3.11 and numpy 2.4, pandas 3.1, streamlit 1.67, transformer_lens 4.3: 27.7 MB in 5,980 documents
(code 16.8 MB, docstrings 5.2 MB, prose 0.8 MB, and 0.8 MB of each generated domain), read in 5 s, fingerprint in 0.5 s.
Other versions give another text, and so another fingerprint. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, sha256
from pathlib import Path, PurePath

from sae.text import synthetic
from sae.text.documents import Document, TextReport

# The project's own dependencies, without torch and transformers: their text would outweigh all the rest.
PACKAGES = (
    "numpy",
    "zarr",
    "tokenizers",
    "safetensors",
    "streamlit",
    "transformer_lens",
    "jaxtyping",
    "tqdm",
    "altair",
    "pandas",
    "datasets",
)
PACKAGE_BYTES = 2_000_000
FILE_BYTES = 500_000  # longer files are mostly tables and generated code
DOCUMENT_CHARS = (60, 8_000)

RULE = 1  # part of the fingerprint: increase it when the rule for cutting documents changes
SKIPPED_DIRECTORIES = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "_testing",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "__pycache__",
}
PROSE_SUFFIXES = {".md", ".rst", ".txt"}
PROSE_NAME = re.compile(r"readme|licen[cs]e|copying|notice|authors", re.IGNORECASE)
TOPICS = "pydoc_data/topics.py"  # the Python reference as one dict of strings: prose, not code


@dataclass(frozen=True)
class InstalledFile:
    """One file that is part of the text: `kind` is python, prose, metadata or topics."""

    source: str
    name: str
    kind: str
    raw: bytes


def read(report: TextReport) -> Iterator[Document]:
    """Every document of the default text once, in a fixed order; cached in memory after the first reading."""
    documents, found = _all_documents()
    report.duplicates += found.duplicates
    report.replaced_documents += found.replaced_documents
    for problem in found.first_problems:
        report.note(problem)
    yield from documents


@cache
def fingerprint() -> str:
    """SHA-256 of everything that decides the content: the rule, the Python version, each file, the generated part."""
    python = ".".join(map(str, sys.version_info[:2]))
    digest = sha256(f"{RULE} {python} {synthetic.GENERATED_SHA256}\n".encode())
    for file in _installed_files(TextReport()):
        digest.update(f"{file.source}\0{file.name}\0{file.kind}\0{len(file.raw)}\0".encode())
        digest.update(file.raw)
    return digest.hexdigest()


@cache
def _all_documents() -> tuple[tuple[Document, ...], TextReport]:
    report = TextReport()
    seen: set[bytes] = set()
    documents: list[Document] = []
    for document in _cut_all(report):
        key = blake2b(document.text.encode("utf-8"), digest_size=16).digest()
        if key in seen:
            report.duplicates += 1
        else:
            seen.add(key)
            documents.append(document)
    return tuple(documents), report


def _cut_all(report: TextReport) -> Iterator[Document]:
    for file in _installed_files(report):
        count: Counter[str] = Counter()  # of pieces so far, by domain
        for domain, text in _texts(file, report):
            for piece in _pieces(text):
                yield Document(f"{file.source}/{file.name}:{domain}:{count[domain]}", piece, domain, file.source)
                count[domain] += 1
    yield from synthetic.generate()


# --- which files -----------------------------------------------------------------------------------------------------


def _installed_files(report: TextReport) -> Iterator[InstalledFile]:
    yield from _standard_library(Path(sysconfig.get_path("stdlib")))
    for package in PACKAGES:
        yield from _package_files(package, report)


def _standard_library(root: Path) -> Iterator[InstalledFile]:
    source = f"python-{'.'.join(map(str, sys.version_info[:3]))}"
    for directory in _directories(root):
        for path in sorted(directory.iterdir()):
            name = path.relative_to(root).as_posix()
            # _sysconfigdata contains paths of the machine that built this Python.
            if not path.is_file() or path.name.startswith("_sysconfigdata"):
                continue
            kind = "topics" if name == TOPICS else _kind(PurePath(name))
            if kind and (kind == "topics" or path.stat().st_size <= FILE_BYTES):
                yield InstalledFile(source, name, kind, path.read_bytes())


def _directories(root: Path) -> Iterator[Path]:
    """`root` and the wanted directories below it, sorted."""
    yield root
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.is_symlink() and _wanted(path.name):
            yield from _directories(path)


def _wanted(directory: str) -> bool:
    hidden = directory.startswith((".", "config-"))
    return directory not in SKIPPED_DIRECTORIES and not hidden


def _package_files(package: str, report: TextReport) -> Iterator[InstalledFile]:
    """Files of one installed package in RECORD order, up to `PACKAGE_BYTES`."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        report.note(f"{package} is not installed: its text is missing")
        return
    source, taken_bytes = f"{package}-{distribution.version}", 0
    for file in distribution.files or ():
        kind = _kind(file) if all(_wanted(part) for part in file.parts[:-1]) else None
        if kind is None:
            continue
        try:
            raw = Path(str(file.locate())).read_bytes()
        except OSError as error:
            report.note(f"{source}: {file} cannot be read ({error.strerror})")
            continue
        if len(raw) <= FILE_BYTES and taken_bytes + len(raw) <= PACKAGE_BYTES:
            taken_bytes += len(raw)
            yield InstalledFile(source, file.as_posix(), kind, raw)


def _kind(path: PurePath) -> str | None:
    if path.parts[0].endswith((".dist-info", ".egg-info")):
        if path.name == "METADATA":
            return "metadata"
        return "prose" if PROSE_NAME.search("/".join(path.parts[1:])) else None
    if path.suffix == ".py":
        return "python"
    return "prose" if path.suffix in PROSE_SUFFIXES else None


# --- which texts -----------------------------------------------------------------------------------------------------


def _texts(file: InstalledFile, report: TextReport) -> Iterator[tuple[str, str]]:
    """(domain, text) pairs of one file."""
    try:
        text = file.raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        report.replaced_documents += 1
        report.note(f"{file.source}/{file.name} is not UTF-8")
        text = file.raw.decode("utf-8-sig", errors="replace")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if file.kind == "python":
        docstrings, code = split_docstrings(text)
        yield "docstrings", "\n\n".join(docstrings)
        yield "code", code
    elif file.kind == "topics":
        for topic in _strings_of_dict(text):
            yield "prose", topic
    elif file.kind == "metadata":
        yield "prose", text.partition("\n\n")[2]
    else:
        yield "prose", text


def split_docstrings(source: str) -> tuple[list[str], str]:
    """The docstrings of a module, its classes and functions in source order, and the source without them.

    A source that does not parse counts as code. A docstring on the same line as code stays in the code as well.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in other projects' files
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [], source
    lines = source.split("\n")
    docstrings: list[str] = []
    removed: set[int] = set()
    for node in _documented(tree):
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        docstrings.append(docstring)
        place = node.body[0]
        assert place.end_lineno is not None
        first, last = place.lineno - 1, place.end_lineno - 1
        indent = len(lines[first]) - len(lines[first].lstrip())
        after = lines[last].encode()[place.end_col_offset :].strip()
        if indent == place.col_offset and not after:
            removed.update(range(first, last + 1))
    return docstrings, "\n".join(line for number, line in enumerate(lines) if number not in removed)


def _documented(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Modules, classes and functions in source order; expressions are not searched (they have no docstrings)."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield from _documented(child)


def _strings_of_dict(source: str) -> list[str]:
    """The string values of the first dict literal in a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            return [v.value for v in node.values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    return []


def _pieces(text: str) -> Iterator[str]:
    """Cuts at line ends into pieces of at most 8,000 characters; drops those shorter than 60."""
    least, most = DOCUMENT_CHARS
    while len(text) > most:
        end = text.rfind("\n", 0, most) + 1 or most
        piece, text = text[:end], text[end:]
        if len(piece.strip()) >= least:
            yield piece
    if len(text.strip()) >= least:
        yield text
