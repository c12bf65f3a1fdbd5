"""Text sources against files written here, and the split rule against hashlib."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from sae.text.documents import DOCUMENT_BYTES, Document, TextReport, sha256_of, shuffled, split_of
from sae.text.sources import TextError, TextSource, combine, open_text
from store.common import HELD_OUT, TRAIN

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(source: TextSource) -> list[str]:
    return sorted(document.text for document in source.documents())


def document(text: str) -> Document:
    return Document(f"id {text}", text, "d", "s")


# --- split -----------------------------------------------------------------------------------------------------------


def test_split_is_the_frozen_rule() -> None:
    """8-byte blake2b of the UTF-8 text, big-endian, mod 20; the literals were computed once and must never move."""
    for text, split in {"a": TRAIN, "monosem": TRAIN, "Grüße 世界": TRAIN, "": TRAIN, "text 30": HELD_OUT}.items():
        expected = int(blake2b(text.encode("utf-8"), digest_size=8).hexdigest(), 16) % 20 == 0
        assert split_of(text) == (HELD_OUT if expected else TRAIN) == split, text


def test_about_one_text_in_twenty_is_held_out() -> None:
    share = sum(split_of(f"text {i}") == HELD_OUT for i in range(20_000)) / 20_000
    assert abs(share - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5


def test_split_depends_on_the_text_alone() -> None:
    assert Document("1", "text 30", "a", "b").split == Document("2", "text 30", "c", "d").split == HELD_OUT


def test_sha256_is_of_the_utf8_bytes() -> None:
    assert sha256_of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- shuffle ---------------------------------------------------------------------------------------------------------


def test_shuffle_does_not_depend_on_the_input_order() -> None:
    documents = [document(t) for t in "abcde"]
    orders = {tuple(d.text for d in shuffled(iter(p))) for p in permutations(documents)}
    assert len(orders) == 1
    assert sorted(orders.pop()) == list("abcde")


def test_shuffle_order_is_frozen() -> None:
    """Stores are resumed by their place in this order: a second, personalised blake2b, ascending."""
    texts = [f"text {i}" for i in range(100)]
    expected = sorted(texts, key=lambda t: blake2b(t.encode(), digest_size=8, person=b"order").hexdigest())
    assert [d.text for d in shuffled(document(t) for t in texts)] == expected


def test_shuffle_mixes_a_sorted_source() -> None:
    order = [int(d.text) for d in shuffled(document(str(i)) for i in range(1000))]
    assert sorted(order) == list(range(1000))
    first_half = sum(i < 500 for i in order[:500])
    assert 200 < first_half < 300  # binomial, 500 draws: within 4.5 standard deviations


def test_shuffle_reads_no_further_than_its_window() -> None:
    taken = 0

    def source() -> Iterator[Document]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield document(f"{i:010d}")

    stream = shuffled(source(), window_bytes=50 * (10 + DOCUMENT_BYTES))
    first = next(stream)
    assert taken == 50
    assert int(first.text) < 50
    assert sorted([first.text] + [d.text for d in stream]) == [f"{i:010d}" for i in range(1000)]


def test_split_and_order_are_independent() -> None:
    """Held-out texts do not gather at one end of the order."""
    order = list(shuffled(document(f"text {i}") for i in range(8000)))
    places = [i for i, d in enumerate(order) if d.split == HELD_OUT]
    assert abs(sum(places) / len(places) / 8000 - 0.5) < 5 * (1 / 12 / len(places)) ** 0.5


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(("suffix", "domain"), [(".txt", "text"), (".md", "markdown"), (".py", "python")])
def test_plain_files(tmp_path: Path, packing: str, suffix: str, domain: str) -> None:
    text = "first line\r\nGrüße\0世界\n" * 50
    path = written(tmp_path / f"one{suffix}{packing}", PACKERS[packing](text.encode()))
    source = open_text(path)
    assert list(source.documents()) == [Document(path.name, text, domain, path.name)]
    assert source.report.documents == 1
    assert source.report.text_bytes == len(text.encode())


@pytest.mark.parametrize("packing", PACKERS)
def test_jsonl_files(tmp_path: Path, packing: str) -> None:
    lines = [{"id": "x", "text": "one", "domain": "poem", "source": "me"}, {"text": "two"}]
    raw = "\r\n".join(json.dumps(line) for line in lines).encode()
    path = written(tmp_path / f"d.jsonl{packing}", PACKERS[packing](raw))
    found = sorted(open_text(path).documents(), key=lambda d: d.text)
    name = path.name
    assert found == [Document("x", "one", "poem", "me"), Document(f"{name}:2", "two", "text", name)]


def test_a_directory_is_read_whole_and_other_files_are_counted(tmp_path: Path) -> None:
    written(tmp_path / "b" / "deep" / "two.md", "two")
    written(tmp_path / "a.TXT", "one")
    written(tmp_path / "c.csv", "x,y")
    written(tmp_path / "LICENSE", "free")
    source = open_text(tmp_path)
    assert {d.id: d.text for d in source.documents()} == {"a.TXT": "one", "b/deep/two.md": "two"}
    assert source.report.ignored_files == 2
    assert "2 files not read (1 .csv, 1 no suffix)" in source.report.summary()


def test_documents_can_be_read_again_with_fresh_counts(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "one")
    written(tmp_path / "b.txt", "two")
    source = open_text(tmp_path)
    assert list(source.documents()) == list(source.documents())
    assert source.report.documents == 2


def test_byte_order_mark_and_undecodable_bytes(tmp_path: Path) -> None:
    written(tmp_path / "bom.txt", b"\xef\xbb\xbfmarked")
    written(tmp_path / "bad.txt", b"caf\xe9 au lait")
    source = open_text(tmp_path)
    assert texts(source) == ["caf\ufffd au lait", "marked"]
    assert source.report.replaced_documents == 1
    assert source.report.first_problems == ["bad.txt: byte 3 is not UTF-8"]


def test_empty_files_are_counted(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "")
    written(tmp_path / "b.txt", " \n\t\n")
    written(tmp_path / "c.txt", "words")
    written(tmp_path / "d.jsonl", '{"text": ""}\n')
    source = open_text(tmp_path)
    assert texts(source) == ["words"]
    assert source.report.empty == 3


def test_broken_jsonl_lines_are_counted_and_named(tmp_path: Path) -> None:
    lines = [b'{"text": "good"}', b'{"text": "cut', b'{"text": 3}', b'{"body": "x"}', b"[1]", b"", b"[" * 100_000]
    path = written(tmp_path / "d.jsonl", b"\n".join([*lines, b'{"text": "caf\xe9"}']))
    source = open_text(path)
    assert texts(source) == ["caf\ufffd", "good"]
    assert source.report.broken_lines == 5
    assert source.report.replaced_documents == 1
    assert source.report.first_problems[0].startswith("d.jsonl:2:")
    assert len(source.report.first_problems) == 5
    assert "5 broken jsonl lines" in source.report.summary()


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    r"""JSON can spell half a pair (`\ud83d`); tokenizers refuse such strings, so they must not get that far."""
    path = written(tmp_path / "d.jsonl", rb'{"text": "a \ud83d b"}' + b"\n" + rb'{"text": "\ud83d\ude00"}')
    source = open_text(path)
    assert texts(source) == ["a \ufffd b", "😀"]
    assert source.report.replaced_documents == 1


def test_several_zstd_frames_are_one_file(tmp_path: Path) -> None:
    pack = zstandard.ZstdCompressor().compress
    parts = ["one\n" * 40_000, "two\n", "three\n" * 50_000]
    path = written(tmp_path / "a.txt.zst", b"".join(pack(p.encode()) for p in parts))
    assert texts(open_text(path)) == ["".join(parts)]


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "not packed"])
def test_damaged_archives_are_named(tmp_path: Path, packing: str, damage: str) -> None:
    packed = bytearray(PACKERS[packing](os.urandom(200_000)))
    if damage == "truncated":
        packed = packed[:150_000]
    elif damage == "corrupt":
        packed[:20] = b"\x1f\x8b\x08" + b"\xff" * 17 if packing == ".gz" else bytes(reversed(packed[:20]))
    else:
        packed = bytearray(b"plain text in disguise")
    path = written(tmp_path / f"a.txt{packing}", bytes(packed))
    with pytest.raises(TextError, match=str(path)):
        list(open_text(path).documents())


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no such file or directory"):
        open_text(tmp_path / "nowhere")


def test_nothing_readable_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="found no files"):
        open_text(tmp_path)
    written(tmp_path / "a.csv", "x")
    with pytest.raises(TextError, match=r"found \.csv, expected \.txt"):
        open_text(tmp_path)
    with pytest.raises(TextError, match=r"found \.csv"):
        open_text(tmp_path / "a.csv")


def test_a_source_with_empty_documents_only_says_so(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", '{"text": " "}\n{"no": 1}\n')
    with pytest.raises(TextError, match=r"1 empty; 1 broken jsonl lines(.|\n)*d\.jsonl:2"):
        list(open_text(path).documents())


def test_fingerprint_follows_names_and_bytes(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "one")
    before = open_text(tmp_path).fingerprint
    assert open_text(tmp_path).fingerprint == before
    written(tmp_path / "ignored.csv", "x")
    assert open_text(tmp_path).fingerprint == before
    written(tmp_path / "a.txt", "onE")
    changed = open_text(tmp_path).fingerprint
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({before, changed, open_text(tmp_path).fingerprint}) == 3


def test_combine(tmp_path: Path) -> None:
    written(tmp_path / "x" / "a.txt", "one")
    written(tmp_path / "x" / "z.bin", "?")
    written(tmp_path / "y" / "b.txt", "two")
    written(tmp_path / "y" / "z.bin", "?")
    x, y = open_text(tmp_path / "x"), open_text(tmp_path / "y")
    both = combine([x, y])
    assert texts(both) == ["one", "two"]
    assert both.report.documents == 2
    assert both.report.ignored_files == 2
    assert len({x.fingerprint, y.fingerprint, both.fingerprint}) == 3
    assert [d.text for d in both.documents()] == [d.text for d in combine([y, x]).documents()]
    assert combine([x]) is x


# --- Hugging Face datasets -------------------------------------------------------------------------------------------

RECORDS: list[dict[str, Any]] = [
    {"text": "one", "domain": "poem"},
    {"text": None, "domain": "x"},
    {"text": "two", "domain": "prose"},
]


@pytest.fixture(params=["arrow", "arrow splits", "parquet"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Saves records as a dataset the way users have them on disk; gives the directory."""

    def save(records: list[dict[str, Any]]) -> Path:
        path = tmp_path / "dataset"
        data = datasets.Dataset.from_list(records)
        if request.param == "arrow":
            data.save_to_disk(str(path))
        elif request.param == "arrow splits":
            datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(path))
        else:
            (path / "data").mkdir(parents=True)
            data.to_parquet(str(path / "data" / "train-00000.parquet"))
        return path

    return save


def test_local_datasets(saved: Callable[[list[dict[str, Any]]], Path]) -> None:
    source = open_text(saved(RECORDS))
    assert sorted((d.text, d.domain) for d in source.documents()) == [("one", "poem"), ("two", "prose")]
    assert source.report.broken_lines == 1
    assert texts(source) == ["one", "two"]


def test_a_dataset_without_text_names_its_columns(saved: Callable[[list[dict[str, Any]]], Path]) -> None:
    path = saved([{"body": "x", "title": "y"}])
    with pytest.raises(TextError, match=r"no column \"text\"; its columns are \['body', 'title'\]"):
        list(open_text(path).documents())


def test_the_fingerprint_of_a_dataset_follows_its_files(saved: Callable[[list[dict[str, Any]]], Path]) -> None:
    path = saved(RECORDS)
    before = open_text(path).fingerprint
    assert open_text(path).fingerprint == before
    written(path / "more.md", "x")
    assert open_text(path).fingerprint != before


def test_damaged_datasets_are_named(tmp_path: Path) -> None:
    written(tmp_path / "p" / "a.parquet", b"PAR1 but not really")
    with pytest.raises(TextError):
        list(open_text(tmp_path / "p").documents())
    written(tmp_path / "s" / "state.json", "{}")
    with pytest.raises(TextError, match="cannot be opened"):
        open_text(tmp_path / "s")


def test_saved_splits_without_train_are_named(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_list(RECORDS)}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(TextError, match=r"\['test'\]"):
        open_text(tmp_path / "d")


def test_a_hub_name_streams_its_train_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return datasets.Dataset.from_list([{"text": "one"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_text("owner/name")
    assert list(source.documents()) == [Document("owner/name#0", "one", "text", "owner/name")]
    assert calls == [(("owner/name",), {"split": "train", "streaming": True})]


def test_hub_errors_are_text_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TextError, match="'owner/name' is neither a path here nor a dataset.*no route"):
        open_text("owner/name")


def test_a_connection_lost_on_the_way_is_a_text_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def records() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: records())
    with pytest.raises(TextError, match="owner/name cannot be read after owner/name#0: reset by peer"):
        list(open_text("owner/name").documents())


def test_report_keeps_the_first_problems() -> None:
    report = TextReport()
    for i in range(9):
        report.note(str(i))
    assert report.first_problems == list("01234")


# --- ugly input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joiner", ["\n", " ", ""])
def test_a_document_too_long_to_tokenise_is_cut_and_its_parts_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joiner: str
) -> None:
    monkeypatch.setattr("sae.text.sources.MAX_DOCUMENT_CHARACTERS", 1000)
    for number in range(30):
        whole = joiner.join(f"word{i * 7919 % 1009}-{number}" for i in range(2000))
        (tmp_path / "long.txt").write_text(whole)
        source = open_text(tmp_path / "long.txt")
        parts = sorted(source.documents(), key=lambda d: int(d.id.split("#")[1]))
        assert "".join(part.text for part in parts) == whole
        assert max(len(part.text) for part in parts) <= 1000
        assert {part.split for part in parts} == {split_of(whole)}  # both parts are always in the same split
        assert all(part.text.endswith(joiner) for part in parts[:-1])
        assert len({part.id for part in parts}) == len(parts)
    assert (source.report.documents, source.report.long_documents) == (1, 1)
    assert "1 too long and cut into parts" in source.report.summary()


def test_a_million_short_documents_are_shuffled_in_bounded_memory() -> None:
    """The window counts what Python adds to a short text: it is drained long before they are all in memory."""
    drawn = 0

    def short() -> Iterator[Document]:
        nonlocal drawn
        for number in range(1_000_000):
            drawn = number + 1
            yield Document(str(number), "x", "d", "s")

    stream = shuffled(short(), window_bytes=100 * (DOCUMENT_BYTES + 1))
    for taken in range(1, 1000):
        next(stream)
        assert drawn <= taken + 100


def test_mixed_encodings_nul_bytes_and_broken_lines_are_read_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve café".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes(b"with\x00nul and \x07bell")
    (tmp_path / "c.txt").write_bytes("latin caf\xe9".encode("latin-1"))
    (tmp_path / "d.txt").write_bytes("\ufeffmarked".encode())
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b"\x00\x00",
        b'{"text": 5}',
        b"[" * 100_000,
        b'{"text": "a\\u0000b"}',
    ]
    (tmp_path / "e.jsonl").write_bytes(b"\n".join(lines))
    source = open_text(tmp_path)
    texts = {document.text for document in source.documents()}
    assert texts == {"naïve café", "with\x00nul and \x07bell", "latin caf\ufffd", "marked", "good", "a\x00b"}
    assert source.report.broken_lines == 4
    assert source.report.replaced_documents == 1
    assert "4 broken jsonl lines" in source.report.summary()
