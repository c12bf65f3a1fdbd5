"""The default text: the generated part pinned byte for byte, the installed part by its rules."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sae.text import default_corpus, synthetic
from sae.text.default_corpus import split_docstrings
from sae.text.documents import Document, TextReport
from sae.text.sources import open_text
from store.common import HELD_OUT

INSTALLED_DOMAINS = {"code", "docstrings", "prose"}
GENERATED_DOMAINS = {"dna", "base64", "hex", "dates", "arithmetic", "urls"}
FRESH_SHA256 = "from sae.text.synthetic import generated_sha256; print(generated_sha256())"
FRESH_FINGERPRINT = "from sae.text.default_corpus import fingerprint; print(fingerprint())"


@pytest.fixture(scope="module")
def generated() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for document in synthetic.generate():
        found.setdefault(document.domain, []).append(document.text)
    return found


@pytest.fixture(scope="module")
def whole() -> list[Document]:
    return list(default_corpus.read(TextReport()))


def fresh(program: str) -> str:
    """What a new interpreter prints, with another hash seed and locale."""
    environment = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


ROOT = Path(default_corpus.__file__).parent.parent


# --- generated -------------------------------------------------------------------------------------------------------


def test_the_generated_text_is_pinned() -> None:
    pinned = "aa3d01420ef02802cb809059ee86e6df470d46def597391b75d2e704dcd132cc"
    assert synthetic.generated_sha256() == synthetic.GENERATED_SHA256 == pinned
    assert fresh(FRESH_SHA256) == pinned


def test_generated_domains_have_their_size(generated: dict[str, list[str]]) -> None:
    assert set(generated) == GENERATED_DOMAINS
    for domain, texts in generated.items():
        assert 800_000 <= sum(map(len, texts)) < 810_000, domain
        assert min(map(len, texts)) >= 1_000
        assert len(set(texts)) == len(texts)
        assert all(text.isascii() for text in texts)


def test_generated_sums_and_products_are_right(generated: dict[str, list[str]]) -> None:
    text = "\n".join(generated["arithmetic"])
    simple = re.findall(r"^(\d+) ([-+*/]) (\d+) = (-?\d+)$", text, re.MULTILINE)
    right: dict[str, Callable[[int, int], float]] = {
        "+": int.__add__,
        "-": int.__sub__,
        "*": int.__mul__,
        "/": int.__truediv__,
    }
    assert len(simple) > 10_000
    assert {sign for _, sign, _, _ in simple} == set(right)
    assert all(right[sign](int(a), int(b)) == int(c) for a, sign, b, c in simple)


def test_generated_encodings_decode(generated: dict[str, list[str]]) -> None:
    armoured = re.findall(r"-----BEGIN (\w+)-----\n([^-]+)\n-----END \1-----", "\n".join(generated["base64"]))
    assert len(armoured) > 50
    sizes = [len(base64.b64decode(body.replace("\n", ""), validate=True)) for _, body in armoured]
    assert max(sizes) < 900 <= max(sizes) + 50
    dump = re.compile(r"^[0-9a-f]{8}  ((?:[0-9a-f]{2} ?){8})  ((?:[0-9a-f]{2} ?){8})  \|(.{16})\|$", re.MULTILINE)
    rows = dump.findall("\n".join(generated["hex"]))
    assert len(rows) > 500
    for left, right, seen in rows:
        raw = bytes.fromhex(left + right)
        assert seen == "".join(chr(b) if 32 <= b < 127 else "." for b in raw)


def test_generated_sequences_are_sequences(generated: dict[str, list[str]]) -> None:
    lines = [line for text in generated["dna"] for line in text.splitlines() if re.fullmatch("[A-Z]{60}", line)]
    assert len(lines) > 3_000
    bases = Counter("".join(lines))
    assert set(bases) == set("ACGT")
    assert max(bases.values()) / min(bases.values()) < 1.1


# --- installed -------------------------------------------------------------------------------------------------------


def test_every_domain_is_there_once(whole: list[Document]) -> None:
    size = Counter[str]()
    for document in whole:
        size[document.domain] += len(document.text.encode())
    assert set(size) == INSTALLED_DOMAINS | GENERATED_DOMAINS
    assert min(size.values()) > 200_000
    assert 15e6 < sum(size.values()) < 40e6
    assert len({d.text for d in whole}) == len({d.id for d in whole}) == len(whole)
    assert max(len(d.text) for d in whole) <= 8_000


def test_both_splits_hold_every_domain(whole: list[Document]) -> None:
    held_out = Counter(d.domain for d in whole if d.split == HELD_OUT)
    assert set(held_out) == INSTALLED_DOMAINS | GENERATED_DOMAINS
    assert 0.03 < sum(held_out.values()) / len(whole) < 0.07


def test_no_tests_and_no_machine_paths(whole: list[Document]) -> None:
    parts = {part for d in whole for part in d.id.rpartition(":code")[0].split("/")}
    assert not parts & {"test", "tests", "site-packages", "idlelib", ".."}
    assert not any("_sysconfigdata" in d.id for d in whole)


@pytest.mark.slow
def test_reading_anew_gives_the_same(whole: list[Document]) -> None:
    default_corpus._all_documents.cache_clear()
    assert list(default_corpus.read(TextReport())) == whole


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    before = default_corpus.fingerprint()
    default_corpus.fingerprint.cache_clear()
    assert default_corpus.fingerprint() == before == fresh(FRESH_FINGERPRINT)


def test_open_text_knows_the_default(whole: list[Document]) -> None:
    source = open_text("default")
    assert sorted(d.id for d in source.documents()) == sorted(d.id for d in whole)
    assert source.fingerprint == default_corpus.fingerprint()
    assert source.report.documents == len(whole)
    assert source.report.duplicates > 0  # licences, at least


# --- a made-up installation ------------------------------------------------------------------------------------------


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One package `toy`, RECORD order z before a, beside one that is not installed; an empty standard library."""
    files = {
        "toy/z.py": '"""Docstring of module z, long enough to be worth a document of its own, surely."""\nZ = 1\n',
        "toy/a.py": "VALUE = 'caf\udce9'  # a Latin-1 byte in a file that ought to be UTF-8, and some more words\n",
        "toy/tests/test_a.py": "assert True  # a test, which is left out of the text whatever its length may be\n",
        "toy/big.py": "x = 1\n" * 100_000,
        "toy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n\n# Toy\n\n" + "Words. " * 20,
        "toy-1.0.dist-info/licenses/LICENSE": "Permission is hereby granted to everyone, for everything. " * 3,
        "toy-1.0.dist-info/top_level.txt": "toy\n" * 40,
        "toy/copy.md": "Permission is hereby granted to everyone, for everything. " * 3,
    }
    site = tmp_path / "site"
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    record = "".join(f"{name},,\n" for name in [*files, "toy/gone.py", "../../bin/toy.txt"])
    (site / "toy-1.0.dist-info" / "RECORD").write_text(record)
    monkeypatch.setattr(sys, "path", [str(site)])
    (tmp_path / "stdlib").mkdir()
    monkeypatch.setattr(default_corpus, "PACKAGES", ("toy", "not_installed_anywhere"))
    monkeypatch.setattr(default_corpus.sysconfig, "get_path", lambda _: str(tmp_path / "stdlib"))
    monkeypatch.setattr(synthetic, "MAKERS", {})
    default_corpus._all_documents.cache_clear()
    default_corpus.fingerprint.cache_clear()
    yield site
    default_corpus._all_documents.cache_clear()
    default_corpus.fingerprint.cache_clear()


def test_files_are_taken_in_record_order(installation: Path) -> None:
    report = TextReport()
    documents = list(default_corpus.read(report))
    assert [d.id for d in documents] == [
        "toy-1.0/toy/z.py:docstrings:0",
        "toy-1.0/toy/a.py:code:0",
        "toy-1.0/toy-1.0.dist-info/METADATA:prose:0",
        "toy-1.0/toy-1.0.dist-info/licenses/LICENSE:prose:0",
    ]
    assert documents[2].text.startswith("# Toy")
    assert (report.duplicates, report.replaced_documents) == (1, 1)
    assert "not_installed_anywhere is not installed: its text is missing" in report.first_problems


def test_one_byte_moves_the_fingerprint(installation: Path) -> None:
    before = default_corpus.fingerprint()
    (installation / "toy" / "z.py").write_text("Z = 2\n")
    assert default_corpus.fingerprint() == before  # one process, one answer
    default_corpus.fingerprint.cache_clear()
    assert default_corpus.fingerprint() != before


def test_a_package_is_capped(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_corpus, "PACKAGE_BYTES", 200)
    taken = [f.name for f in default_corpus._installed_files(TextReport())]
    assert taken == ["toy/z.py", "toy/a.py"]


# --- docstrings and cutting ------------------------------------------------------------------------------------------

SOURCE = '''"""Module."""
import os

class A:
    """Class
    over lines."""

    def f(self): "inline"; return 1

    async def g(self):
        r"""Raw."""
        if os:
            def inner():
                "Inner."
        x = """no docstring"""

try:
    pass
except ValueError:
    def handler():
        """In a handler."""
'''


def test_docstrings_are_separated_from_code() -> None:
    docstrings, code = split_docstrings(SOURCE)
    assert docstrings == ["Module.", "Class\nover lines.", "inline", "Raw.", "Inner.", "In a handler."]
    assert code == "".join(
        line for number, line in enumerate(SOURCE.splitlines(keepends=True), 1) if number not in (1, 5, 6, 11, 14, 21)
    )


@pytest.mark.parametrize("source", ["def broken(:", "a\0b", "(" * 5_000])
def test_what_does_not_parse_is_code(source: str) -> None:
    assert split_docstrings(source) == ([], source)


def test_pieces_are_cut_at_line_ends_and_lose_nothing() -> None:
    text = "".join(f"line {i} " + "x" * (i % 90) + "\n" for i in range(3_000))
    pieces = list(default_corpus._pieces(text))
    assert "".join(pieces) == text
    assert all(len(p) <= 8_000 and p.endswith("\n") for p in pieces)
    assert all(len(p) > 7_900 for p in pieces[:-1])
    assert [len(p) for p in default_corpus._pieces("y" * 20_000)] == [8_000, 8_000, 4_000]
    assert list(default_corpus._pieces("short")) == []
