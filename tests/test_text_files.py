"""Which files of a directory are text: splits against `datasets` itself, Parquet rows against pyarrow."""

from __future__ import annotations

import gzip
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import made_up_documents

from sae import pipeline
from sae.lm import LanguageModel
from sae.text.sources import TextError, TextSource, open_text
from store.activations import ActivationStore


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def texts(source: TextSource) -> list[str]:
    return sorted(document.text for document in source.documents())


# --- splits ----------------------------------------------------------------------------------------------------------

HUB_LAYOUTS = [
    ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
    ["train.parquet", "validation.parquet", "test.parquet"],
    ["train/0000.parquet", "test/0000.parquet", "dev/0000.parquet"],
    ["default/train/0000.parquet", "default/eval/0000.parquet"],
    ["my_train_file.jsonl", "my_valid_file.jsonl", "testing.jsonl"],
    ["training set/a.jsonl", "evaluation set/a.jsonl"],
    ["one.parquet", "deep/two.parquet"],
    ["latest.parquet", "contest.parquet", "developers.parquet", "trainer.parquet"],  # no words of the Hub's
]


@pytest.mark.parametrize("layout", HUB_LAYOUTS, ids=lambda layout: layout[0])
def test_the_training_text_of_a_directory_is_what_datasets_calls_train(layout: list[str], tmp_path: Path) -> None:
    for name in layout:
        if name.endswith(".parquet"):
            table(tmp_path / "d" / name, text=[f"{name} {i}" for i in range(3)])
        else:
            written(tmp_path / "d" / name, "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(3)))
    hub = datasets.load_dataset(str(tmp_path / "d"), split="train", streaming=True)
    source = open_text(tmp_path / "d")
    assert texts(source) == sorted(record["text"] for record in hub)
    assert source.report.documents + 3 * source.report.ignored_files == 3 * len(layout)


@pytest.mark.parametrize(
    "held_back",
    [
        "data/test_sft-00000-of-00001.parquet",
        "train/test-set.parquet",
        "TEST.parquet",
        "val.jsonl.gz",
        "cfg/partial-test/0.parquet",
    ],
)
def test_a_held_back_split_is_never_training_text(held_back: str, tmp_path: Path) -> None:
    table(tmp_path / "data" / "train-00000-of-00001.parquet", text=["train"])
    if held_back.endswith(".gz"):
        (tmp_path / held_back).write_bytes(gzip.compress(b'{"text": "held back"}'))
    else:
        table(tmp_path / held_back, text=["held back"])
    source = open_text(tmp_path)
    assert texts(source) == ["train"]
    assert " of the split " in source.report.summary()


def test_a_held_back_split_alone_is_refused_and_read_when_it_is_named(tmp_path: Path) -> None:
    path = table(tmp_path / "test-00000-of-00001.parquet", text=["held back"])
    with pytest.raises(TextError, match=r"found \.parquet of the split test.*Name the file or folder of a split"):
        open_text(tmp_path)
    assert texts(open_text(path)) == ["held back"]
    table(tmp_path / "d" / "test" / "0.parquet", text=["also"])
    assert texts(open_text(tmp_path / "d" / "test")) == ["also"]


def test_text_files_are_splits_only_beside_a_split_called_train(tmp_path: Path) -> None:
    for name in ("dev notes.txt", "test.md", "test_main.py"):
        written(tmp_path / name, name)
    assert texts(open_text(tmp_path)) == ["dev notes.txt", "test.md", "test_main.py"]
    written(tmp_path / "train.txt", "train")
    source = open_text(tmp_path)
    assert texts(source) == ["test.md", "test_main.py", "train"]
    assert source.report.not_read == {".txt of the split validation": 1}


def test_other_splits_of_a_saved_dataset_are_counted(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list([{"text": "one"}])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "d"))
    source = open_text(tmp_path / "d")
    assert texts(source) == ["one"]
    assert source.report.not_read == {"split test of a data set": 1}


# --- Parquet among other files ---------------------------------------------------------------------------------------


def test_text_beside_parquet_is_read(tmp_path: Path) -> None:
    table(tmp_path / "deep" / "a.parquet", text=["a row", None, ""])
    written(tmp_path / "book.txt", "a whole book")
    written(tmp_path / "more.jsonl", '{"text": "a line"}\n')
    (tmp_path / "z.md.gz").write_bytes(gzip.compress(b"packed"))
    source = open_text(tmp_path)
    assert texts(source) == ["a line", "a row", "a whole book", "packed"]
    assert (source.report.empty, source.report.broken_lines) == (1, 1)


def test_a_fixture_does_not_hide_a_source_tree(tmp_path: Path) -> None:
    table(tmp_path / "tests" / "fixture.parquet", number=[1])
    table(tmp_path / "tests" / "two.parquet", a=["x"], b=["y"])
    written(tmp_path / "tests" / "broken.parquet", "PAR1 but not really")
    written(tmp_path / "tests" / "empty.parquet", "")
    written(tmp_path / "main.py", "print('hi')")
    source = open_text(tmp_path)
    assert texts(source) == ["print('hi')"]
    assert source.report.not_read == {".parquet without text": 4}
    problems = "\n".join(source.report.first_problems)
    assert "fixture.parquet has no column \"text\"; its columns are ['number']" in problems
    assert "broken.parquet not a Parquet file" in problems
    table(tmp_path / "data" / "train-00000-of-00001.parquet", number=[1])
    with pytest.raises(TextError, match=r"train-00000-of-00001.parquet has no column"):
        open_text(tmp_path)


def test_a_single_parquet_file(tmp_path: Path) -> None:
    path = table(tmp_path / "one.parquet", text=["a", "b"], id=[7, 8], domain=["x", None])
    found = sorted((d.id, d.text, d.domain, d.source) for d in open_text(path).documents())
    assert found == [("7", "a", "x", "one.parquet"), ("8", "b", "text", "one.parquet")]


def test_the_card_of_a_data_set_is_not_text_but_other_readmes_are(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", text=["a"])
    written(tmp_path / "README.md", "---\nlicense: mit\n---\n# A data set\n")
    source = open_text(tmp_path)
    assert texts(source) == ["a"]
    assert source.report.not_read == {"card of a data set": 1}
    written(tmp_path / "README.md", "# Notes\n")
    assert texts(open_text(tmp_path)) == ["# Notes\n", "a"]


def test_every_row_of_many_row_groups_is_read_once(tmp_path: Path) -> None:
    expected = []
    for number in range(3):
        path = tmp_path / f"part-{number}.parquet"
        column = pa.array([f"{number} {i}" for i in range(500)], pa.large_string()).dictionary_encode()
        pq.write_table(pa.table({"text": column, "other": range(500)}), path, row_group_size=70)
        expected += pq.read_table(path)["text"].to_pylist()
    documents = list(open_text(tmp_path).documents())
    assert sorted(d.text for d in documents) == sorted(expected)
    # rows are numbered through all files, as version 0.1 did
    assert {d.id: d.text for d in documents} == {f"{tmp_path.name}#{n}": text for n, text in enumerate(expected)}


def test_what_is_no_plain_file_is_counted(tmp_path: Path) -> None:
    written(tmp_path / "d" / "a.txt", "a")
    written(tmp_path / "elsewhere" / "b.txt", "b")
    (tmp_path / "d" / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "linked.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    source = open_text(tmp_path / "d")
    assert texts(source) == ["a", "b"]
    assert source.report.not_read == {"broken links or special files": 1, "linked directories": 1}


def test_damage_inside_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", text=[f"{i} " * 40 for i in range(4000)])
    raw = bytearray(path.read_bytes())
    raw[4:-8000] = bytes(len(raw) - 8004)
    path.write_bytes(raw)
    with pytest.raises(TextError, match=r"a\.parquet"):
        list(open_text(path).documents())


def test_undecodable_utf16_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\0b")
    source = open_text(tmp_path)
    assert texts(source) == ["a\ufffd"]
    assert source.report.replaced_documents == 1


# --- columns ---------------------------------------------------------------------------------------------------------


def test_the_only_column_of_strings_is_the_text(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", content=["x"], id=["1"], number=[3])
    assert [(d.id, d.text) for d in open_text(path).documents()] == [("1", "x")]
    line = written(tmp_path / "a.jsonl", '{"content": "y", "number": 3}\n')
    assert texts(open_text(line)) == ["y"]


def test_several_columns_of_strings_have_to_be_chosen_from(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", question=["q"], answer=["a"])
    with pytest.raises(TextError, match=r"a.parquet has no column \"text\"; .*'answer', 'question'.*--text-column"):
        open_text(path)
    assert texts(open_text(path, column="answer")) == ["a"]
    with pytest.raises(TextError, match=r"no column \"reply\"; its columns are \['answer', 'question'\]"):
        open_text(path, column="reply")
    line = written(tmp_path / "a.jsonl", '{"question": "q", "answer": "a"}\n')
    assert texts(open_text(line, column="question")) == ["q"]
    with pytest.raises(TextError, match=r'no string under "text"'):
        list(open_text(line).documents())


def test_the_column_asked_for_wins_over_text(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", text=["q"], answer=["a"], n=[1])
    assert texts(open_text(path, column="answer")) == ["a"]
    with pytest.raises(TextError, match="neither strings, nor chat messages"):
        open_text(path, column="n")
    assert len({open_text(path, column=name).fingerprint for name in (None, "answer", "text")}) == 3


def test_the_column_of_a_saved_dataset_can_be_chosen(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"question": "q", "answer": "a"}]).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(TextError, match="--text-column"):
        open_text(tmp_path / "d")
    assert texts(open_text(tmp_path / "d", column="answer")) == ["a"]


def test_the_column_is_recorded_and_used_again_to_repair(tmp_path: Path, tiny_model: LanguageModel) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": f"{d.id}", "a": d.text}) + "\n" for d in made_up_documents(80)))
    source = pipeline.source_of(path, text_column="a")
    store = pipeline.harvest(tiny_model, source, tmp_path / "acts.zarr", tokens=512, heldout_tokens=32, seq_len=16)
    opened = ActivationStore.open(store)
    assert opened.provenance["text_column"] == "a"
    (tmp_path / "acts.zarr" / "hooks" / "blocks.0.mlp.hook_post" / "acts" / "c" / "9" / "0").write_bytes(b"damaged")
    found, left = pipeline.repair(store, model=tiny_model)
    assert found
    assert left == []


# --- fingerprints ----------------------------------------------------------------------------------------------------


def hashed(root: Path) -> str:
    """The rule of version 0.1: every file of the directory, by name and bytes."""
    whole = sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        whole.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def test_fingerprints_of_version_0_1_stay_where_the_reading_did(tmp_path: Path) -> None:
    written(tmp_path / "texts" / "a.txt", "a")
    written(tmp_path / "texts" / "b" / "c.jsonl", '{"text": "c"}\n')
    table(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", text=["a"])
    written(tmp_path / "hub" / ".gitattributes", "*.parquet filter=lfs\n")
    written(tmp_path / "hub" / "README.md", "---\nlicense: mit\n---\n")
    for name in ("texts", "hub"):
        assert open_text(tmp_path / name).fingerprint == hashed(tmp_path / name)


@pytest.mark.parametrize("added", ["book.txt", "data/test-0.parquet"])
def test_fingerprints_change_where_the_reading_did(tmp_path: Path, added: str) -> None:
    table(tmp_path / "data" / "train-0.parquet", text=["a"])
    if added.endswith(".parquet"):
        table(tmp_path / added, text=["b"])
    else:
        written(tmp_path / added, "b")
    assert open_text(tmp_path).fingerprint != hashed(tmp_path)
