"""Few or long documents: how text is divided between the splits and dealt to lanes, and what a harvest says of it.

Words are numbered and each is used once, so that a token tells which text it came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT, made_up_documents, text_source
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from sae import pipeline
from sae.cli import main
from sae.harvesting import harvest as harvesting
from sae.harvesting.lanes import ALL_TEXT_LANES, EmptySplit, plan
from sae.harvesting.text_lanes import survey
from sae.lm import LanguageModel, NativeModel
from sae.pipeline.harvest import provenance_of
from sae.text.documents import Document, TextReport
from sae.text.sources import TextSource
from sae.text.splits import DIVIDED, LONG_CHARACTERS, WHOLE
from sae.training.live_rows import Contexts
from store.activations import ActivationStore
from store.common import HELD_OUT, LANES, SPLITS, TRAIN

N_WORDS = 60_000
BOS = N_WORDS


def numbered_documents(lengths: list[int], start: int = 0) -> list[Document]:
    """Documents of so many words: w0 w1 w2 …, no word twice."""
    documents = []
    for length in lengths:
        documents.append(Document(f"d{start}", " ".join(f"w{i}" for i in range(start, start + length)), "d", "s"))
        start += length
    return documents


def words_of(texts: list[str]) -> list[int]:
    return [int(word[1:]) for text in texts for word in text.split()]


def by_split(documents: list[Document]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    for document in documents:
        for split, texts in DIVIDED.texts(document).items():
            found[split] += words_of(texts)
    return found


# --- splits: a function of the document alone ------------------------------------------------------------------------


@given(st.integers(1, 40_000), st.integers(0, 20_000), st.sampled_from([" ", "\n", "\u2003"]))
@settings(max_examples=60, deadline=None)
def test_a_long_document_is_in_both_splits_with_a_gap_between_them(length: int, start: int, space: str) -> None:
    """Every word is whole and in one split at most; a twentieth is held out; next to it, text is in neither."""
    text = space.join(f"w{i}" for i in range(start, start + length))
    document = Document("d", text, "d", "s")
    texts = DIVIDED.texts(document)
    if len(text) <= LONG_CHARACTERS:
        assert texts == {document.split: [text]}
        return
    words = {split: words_of(texts[split]) for split in SPLITS}  # raises for half a number only if the "w" is cut off
    assert all(part in text for parts in texts.values() for part in parts)
    assert words[TRAIN] == sorted(set(words[TRAIN]))
    assert words[HELD_OUT] == sorted(set(words[HELD_OUT]))
    assert not set(words[TRAIN]) & set(words[HELD_OUT])
    assert {*words[TRAIN], *words[HELD_OUT]} <= set(range(start, start + length))
    assert len(words[TRAIN]) > 0.9 * length
    assert 0.03 * length < len(words[HELD_OUT]) < 0.06 * length
    for part in texts[HELD_OUT]:
        first, last = words_of([part])[0], words_of([part])[-1]
        nearest = min(min(abs(word - first), abs(word - last)) for word in words[TRAIN])
        assert (
            nearest * len(f"w{start + length} ") > len(part) / 6
        )  # characters: a quarter of the stretch, at whole words


def test_where_a_document_is_divided_depends_on_it_alone() -> None:
    [document] = numbered_documents([9000])
    other = Document("another id", document.text, "other domain", "other source")
    assert DIVIDED.texts(document) == DIVIDED.texts(other)
    places = {DIVIDED.texts(d)[HELD_OUT][0][:20] for d in numbered_documents([3000] * 10)}
    offsets = sorted(words_of([place])[0] % 3000 for place in places)
    assert offsets[-1] - offsets[0] > 1000  # not all at one place of their documents


def test_text_without_spaces_and_blank_text_are_divided_too() -> None:
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    texts = DIVIDED.texts(Document("d", letters, "d", "s"))
    held_out, train = "".join(texts[HELD_OUT]), "".join(texts[TRAIN])
    assert len(held_out) == 1000
    assert not set(held_out) & set(train)
    assert len(train) == 20_000 - 1000 - 2 * 250
    blank = Document("d", "a " + " \n" * 20_000, "d", "s")
    assert [t.strip() for texts in DIVIDED.texts(blank).values() for t in texts] == ["a"]


def test_the_parts_of_a_text_too_long_to_read_at_once_are_divided_and_keep_the_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each part of such a text is divided on its own; its short end, which has no room for gaps, is training text."""
    monkeypatch.setattr("sae.text.sources.MAX_DOCUMENT_CHARACTERS", 20_000)
    [document] = numbered_documents([9000])
    parts = list(text_source([document]).documents())
    assert len(parts) > 2
    found = by_split(parts)
    assert not set(found[TRAIN]) & set(found[HELD_OUT])
    held_out = set(found[HELD_OUT])
    for word in found[HELD_OUT]:
        assert not {word - 5, word + 5} & set(found[TRAIN]) - held_out
    end = min(parts, key=lambda part: len(part.text))
    assert len(end.text) > LONG_CHARACTERS or set(DIVIDED.texts(end)) == {TRAIN}


# --- lanes: a harvest without a model or a disk ----------------------------------------------------------------------


class CountingModel:
    """Its activation at a position is the token's id."""

    bos_id = BOS

    def __init__(self) -> None:
        vocabulary = {f"w{i}": i for i in range(N_WORDS)} | {"[BOS]": BOS}
        self.tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[BOS]"))
        self.tokenizer.pre_tokenizer = WhitespaceSplit()

    def capture_all(self, tokens: torch.Tensor, hook_points: list[str]) -> dict[str, torch.Tensor]:
        return {hook: tokens[..., None].float() for hook in hook_points}


MODEL = CountingModel()


@dataclass
class Sink:
    """A store in memory."""

    seq_len: int
    contexts_per_shard: int
    n_shards: dict[str, int]
    text_lanes: dict[str, int]
    path: str = "memory"
    hook_points: dict[str, int] = field(default_factory=lambda: {"h": 1})
    dtype: dict[str, str] = field(default_factory=lambda: {"h": "float32"})
    shards: dict[tuple[str, int], Any] = field(default_factory=dict)
    finished: bool = False

    def markers(self, split: str) -> dict[int, Any]:
        return {shard: found for (of, shard), found in sorted(self.shards.items()) if of == split}

    def write_shard(self, split: str, shard: int, **arrays: Any) -> None:
        assert (split, shard) not in self.shards
        kept = int(arrays["keep"].sum())
        self.shards[split, shard] = SimpleNamespace(kept_rows=kept, contexts=len(arrays["tokens"]), **arrays)

    def finish(self) -> None:
        self.finished = True

    def kept(self, split: str) -> list[int]:
        return [int(t) for m in self.markers(split).values() for t in m.tokens[m.keep]]


def harvested_in_memory(documents: list[Document], tokens: int, heldout_tokens: int, seq_len: int) -> Sink:
    source, planned = text_source(documents), plan(tokens, heldout_tokens, seq_len)
    model = cast("LanguageModel", MODEL)
    text_lanes = survey(model, source, DIVIDED, planned).text_lanes(planned)
    sink = Sink(seq_len, planned.contexts_per_shard, planned.n_shards, text_lanes)
    harvesting.harvest(model, source, sink)
    return sink


def lengths_of(draw: st.DrawFn) -> list[int]:
    kinds = [st.integers(1, 30), st.integers(200, 1000), st.integers(2000, 20_000)]
    many = draw(st.lists(kinds[0], max_size=60)) + draw(st.lists(kinds[1], max_size=20))
    return [*many, *draw(st.lists(kinds[2], max_size=3))]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_the_documents_nearly_all_rows_asked_for_or_there_are_found(data: st.DataObject) -> None:
    """Each word is kept once at most and in its own split; the count is checked against one over the words."""
    lengths = data.draw(st.composite(lengths_of)())
    documents = numbered_documents(lengths)
    there = by_split(documents)
    tokens, heldout_tokens = data.draw(st.integers(100, 30_000)), data.draw(st.integers(20, 3000))
    seq_len = data.draw(st.sampled_from([16, 64, 256]))
    if not documents or not all(there.values()):
        if documents:
            with pytest.raises(EmptySplit, match="Give more documents, or join short ones"):
                harvested_in_memory(documents, tokens, heldout_tokens, seq_len)
        return
    sink = harvested_in_memory(documents, tokens, heldout_tokens, seq_len)
    assert sink.finished
    for split, asked in ((TRAIN, tokens), (HELD_OUT, heldout_tokens)):
        kept = sink.kept(split)
        assert len(set(kept)) == len(kept)
        assert set(kept) <= set(there[split])
        # A BOS takes a row before each text, and 64 lanes of held-out text may stay while they hold 0.8 of it.
        bos = sum(len(DIVIDED.texts(d).get(split, ())) for d in documents)
        least = 0.8 if split == HELD_OUT else 0.97
        assert len(kept) >= least * min(len(there[split]), asked) - bos


@pytest.mark.parametrize(
    ("lengths", "tokens", "heldout_tokens"),
    [
        ([20_000], 15_000, 800),  # one file
        ([4000] * 10, 30_000, 1500),  # ten books
        ([20_000] + [12] * 1500, 30_000, 1000),  # a very long document next to many tiny ones
        ([1500] * 25, 30_000, 1000),
    ],
    ids=["one file", "ten books", "long and tiny", "twenty-five chapters"],
)
def test_the_rows_asked_for_are_there_whatever_the_workers_and_wherever_they_stopped(
    lengths: list[int], tokens: int, heldout_tokens: int
) -> None:
    documents = numbered_documents(lengths)
    whole = harvested_in_memory(documents, tokens, heldout_tokens, 64)
    for split, asked in ((TRAIN, tokens), (HELD_OUT, heldout_tokens)):
        texts = len(documents) if split == TRAIN else 100
        assert len(whole.kept(split)) >= 0.95 * (asked - texts)
    again = Sink(64, whole.contexts_per_shard, whole.n_shards, whole.text_lanes)
    again.shards |= {key: shard for n, (key, shard) in enumerate(whole.shards.items()) if n % 7 < 3}  # cut off
    source, model = text_source(documents), cast("LanguageModel", MODEL)
    finished = [harvesting.harvest(model, source, again, lanes=range(rank, LANES, 3)) for rank in (2, 0, 1)]
    assert finished == [False, False, True]
    assert again.shards.keys() == whole.shards.keys()
    for key, shard in whole.shards.items():
        for name in ("tokens", "keep", "document"):
            assert np.array_equal(getattr(again.shards[key], name), getattr(shard, name))
        assert (again.shards[key].documents, again.shards[key].cursor) == (shard.documents, shard.cursor)


def test_many_short_documents_keep_their_64_lanes() -> None:
    """Document i is in lane i mod 64, as in version 0.1, whose own store is compared in test_version_0_1.py."""
    documents = numbered_documents([20] * 3000)
    sink = harvested_in_memory(documents, 30_000, 500, 16)
    assert sink.text_lanes == ALL_TEXT_LANES
    for split in SPLITS:
        for shard, found in sink.markers(split).items():
            assert all(number % LANES == shard % LANES for number in found.documents)


def test_a_short_document_has_the_same_number_and_split_next_to_a_long_one() -> None:
    short = numbered_documents([20] * 3000)
    long = Document("long", " ".join(f"v{i}" for i in range(30_000)), "d", "s")
    mixed = harvested_in_memory([*short, long], 50_000, 2000, 64)
    numbers = {d.id: n for n, d in enumerate(text_source([*short, long]).documents())}
    for split in SPLITS:
        for found in mixed.markers(split).values():
            for number, record in found.documents.items():
                assert numbers[record.id] == number
    of_split = {d.id: d.split for d in short}
    for split in SPLITS:
        there = {record.id for m in mixed.markers(split).values() for record in m.documents.values()}
        assert all(of_split.get(name, split) == split for name in there)


def test_a_split_without_kept_rows_is_refused_and_not_finished() -> None:
    """Every token of the held-out documents is unknown, and this tokenizer gives unknown words the BOS."""
    documents = [Document(str(i), f"unknown {i}", "d", "s") for i in range(200)]
    documents += [d for d in numbered_documents([50] * 200) if d.split == TRAIN]
    source, planned = text_source(documents), plan(1000, 100, 16)
    sink = Sink(16, planned.contexts_per_shard, planned.n_shards, ALL_TEXT_LANES)
    with pytest.raises(EmptySplit, match=r"not one row of the heldout split is kept.*delete it"):
        harvesting.harvest(cast("LanguageModel", MODEL), source, sink)
    assert not sink.finished


# --- the store, the messages and the verbs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book() -> list[Document]:
    """One text of about 14,000 characters, made of different documents."""
    return [Document("book.txt", "\n".join(d.text for d in made_up_documents(150)), "prose", "book.txt")]


@pytest.fixture(scope="module")
def book_store(book: list[Document], tiny_model: NativeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    out = tmp_path_factory.mktemp("book") / "acts.zarr"
    pipeline.harvest(
        tiny_model, text_source(book, "book.txt"), out, tokens=4096, heldout_tokens=256, report=said.append
    )
    [found] = [line for line in said if line.startswith("for training: asked for 4,096 rows, got 4,09")]
    assert "held out: asked for 256 rows, got 25" in found
    return out


def test_a_store_of_one_book_trains_and_is_evaluated(book_store: Path, tiny_model: NativeModel, tmp_path: Path) -> None:
    store = ActivationStore.open(book_store)
    assert store.is_complete
    assert store.verify() == []
    assert store.provenance["held_out"] == DIVIDED.held_out
    assert store.text_lanes == {HELD_OUT: 1, TRAIN: 1}
    found = json.loads((book_store / "complete.json").read_text())
    assert found["asked_rows"] == {"heldout": 256, "train": 4096}
    pipeline.train(book_store, tmp_path / "d", d_sae=40, tokens=512, config={"k": 4, "batch_tokens": 128})
    result = pipeline.evaluate(tmp_path / "d", store=book_store, model=tiny_model)
    assert result["tokens"] == store.totals(HELD_OUT, HOOK_POINT).kept_rows > 250


def test_a_damaged_shard_of_a_book_is_harvested_again_in_the_same_bytes(
    book_store: Path, book: list[Document], tiny_model: NativeModel, tmp_path: Path
) -> None:
    import shutil

    copy = Path(shutil.copytree(book_store, tmp_path / "copy.zarr"))
    before = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    for shard in (5, 70, 100):
        (copy / "markers" / TRAIN / f"{shard:08d}.json").unlink()
    found, left = pipeline.repair(copy, model=tiny_model, text=text_source(book, "book.txt"))
    assert (len(found), left) == (3, [])
    assert {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_workers_write_the_bytes_of_one(
    book_store: Path, book: list[Document], tiny_model: NativeModel, tmp_path: Path
) -> None:
    source, out = text_source(book, "book.txt"), tmp_path / "acts.zarr"
    for rank in (1, 0):
        pipeline.harvest(tiny_model, source, out, tokens=4096, heldout_tokens=256, rank=rank, world=2)
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert files == {p.relative_to(book_store): p.read_bytes() for p in book_store.rglob("*") if p.is_file()}


@pytest.mark.parametrize("split", SPLITS)
def test_a_text_that_is_all_in_one_split_is_refused_before_anything_is_written(
    split: str, tiny_model: NativeModel, tmp_path: Path
) -> None:
    documents = [d for d in made_up_documents(300) if d.split == split]
    what = {TRAIN: "is held out", HELD_OUT: "is left to train on"}[split]
    with pytest.raises(ValueError, match=f"no text of made up {what}.*Give more documents"):
        pipeline.harvest(tiny_model, text_source(documents), tmp_path / "acts.zarr", tokens=1000, heldout_tokens=100)
    assert not (tmp_path / "acts.zarr").exists()


def test_less_text_than_asked_for_is_said_by_every_verb(
    book: list[Document], tiny_model: NativeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    out = pipeline.harvest(
        tiny_model, text_source(book), tmp_path / "acts.zarr", tokens=32_768, heldout_tokens=8192, report=said.append
    )
    store = ActivationStore.open(out)
    kept = {split: store.totals(split, HOOK_POINT).kept_rows for split in SPLITS}
    encode = tiny_model.tokenizer.encode
    assert kept == {s: sum(len(encode(t).ids) for t in texts) for s, texts in DIVIDED.texts(book[0]).items()}
    found = f"asked for {store.asked_rows(TRAIN):,} rows, got {kept[TRAIN]:,} from 1 documents; the text has no more"
    assert any(found in line for line in said)
    assert main(["info", str(out)]) == 0
    assert f"got {kept[TRAIN]:,} from 1 documents; the text has no more" in capsys.readouterr().out
    assert pipeline.describe(out)["splits"]["train"]["asked_rows"] == store.asked_rows(TRAIN) >= 32_768
    with pytest.warns(UserWarning, match="has few rows"):
        pipeline.train(out, tmp_path / "d", d_sae=40, tokens=256, config={"k": 4, "batch_tokens": 128})


def test_a_ring_keeps_its_rows_when_the_text_ends_early(
    book: list[Document], tiny_model: NativeModel, tmp_path: Path
) -> None:
    """Shards without text take no row's place: the ring ends with the last rows of the text."""
    out = pipeline.harvest(
        tiny_model, text_source(book), tmp_path / "acts.zarr", tokens=16_384, heldout_tokens=256, keep_rows=64 * 32
    )
    store = ActivationStore.open(out)
    texts = DIVIDED.texts(book[0])[TRAIN]
    ids = [id_ for text in texts for id_ in (0, *tiny_model.tokenizer.encode(text).ids)]
    filled = [store.read_contexts(TRAIN, shard) for shard, m in store.markers(TRAIN).items() if m.contexts]
    tokens = np.concatenate([contexts.tokens.ravel() for contexts in filled])[: len(ids) % 32 - 32 or None]
    assert len(filled) == LANES
    assert np.array_equal(tokens, ids[-len(tokens) :])


def test_a_store_begun_by_the_old_rule_continues_by_it(
    book: list[Document], tiny_model: NativeModel, tmp_path: Path
) -> None:
    """Made as version 0.1 made it: whole documents, 64 lanes. One book fills the shards of one lane."""
    many = [*book, *made_up_documents(60)]
    source, planned = text_source(many), plan(4096, 512, 32)
    store = ActivationStore.create(
        tmp_path / "acts.zarr",
        hook_points={HOOK_POINT: 32},
        seq_len=32,
        contexts_per_shard=planned.contexts_per_shard,
        n_shards=planned.n_shards,
        dtype="float16",
        provenance=provenance_of(tiny_model, source, False, WHOLE),
    )
    assert "text_lanes" not in store.attributes
    pipeline.harvest(tiny_model, source, store.path, tokens=4096, heldout_tokens=512)
    number = next(n for n, d in enumerate(source.documents()) if d.id == "book.txt")
    table = store.documents(book[0].split)
    assert table[number].id == "book.txt"
    for split in SPLITS:
        for shard, marker in store.markers(split).items():
            assert all(n % LANES == shard % LANES for n in marker.documents)
            assert split == book[0].split or number not in marker.documents


def test_live_training_leaves_out_what_a_store_holds_out(book: list[Document], tiny_model: NativeModel) -> None:
    contexts = Contexts(tiny_model, text_source(book), 32)
    kept = [int(t) for tokens, keep in contexts.epoch() for t in tokens[keep]]
    texts = DIVIDED.texts(book[0])[TRAIN]
    assert kept == [id_ for text in texts for id_ in tiny_model.tokenizer.encode(text).ids]
    old = Contexts(tiny_model, text_source(book), 32, rule=WHOLE)
    assert sum(int(keep.sum()) for _, keep in old.epoch()) == (
        len(tiny_model.tokenizer.encode(book[0].text).ids) if book[0].split == TRAIN else 0
    )


def test_counts_of_the_text_are_of_one_reading() -> None:
    """The survey reads the text, and then the harvest does: what is reported is counted once."""

    def read(report: TextReport) -> Iterator[Document]:
        return iter(numbered_documents([2000] * 5))

    source = TextSource("five", read, "f")
    planned = plan(5000, 300, 16)
    found = survey(cast("LanguageModel", MODEL), source, DIVIDED, planned)
    assert (found.documents, source.report.documents) == (5, 5)
    assert found.whole
