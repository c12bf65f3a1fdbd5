"""Harvest: the token of each row, the bytes of a resumed harvest, and too little text or disk space."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT, SHAPE, made_up_documents, text_source, write_jsonl

from sae import pipeline
from sae.harvesting import harvest as harvesting
from sae.harvesting import lanes
from sae.jobs.progress import Interrupted
from sae.lm import NativeModel
from sae.text.documents import Document, sha256_of
from store.activations import ActivationStore
from store.common import HELD_OUT, LANES, TRAIN, DocumentRecord
from store.schema import encode

SEQ_LEN = 32
BOS = 0


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store but its lock, by relative path."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def by_id() -> dict[str, Document]:
    return {d.id: d for d in made_up_documents(4000)}


def filled_shards(store: ActivationStore, split: str) -> list[int]:
    return [shard for shard, marker in store.markers(split).items() if marker.contexts]


# --- lanes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 7, 40])
def test_a_lane_continues_from_the_cursor_of_any_shard(shard_tokens: int) -> None:
    """Without a model or a store: documents of 0 to 20 tokens, packed into the shards of lane 3."""
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 99, rng.integers(0, 21)).astype(np.uint32) for _ in range(30)]
    record = DocumentRecord("id", "source", "domain", "sha256")
    n_shards = {HELD_OUT: 0, TRAIN: LANES * 400}

    def texts(markers: dict[int, Any]) -> list[lanes.ShardText]:
        opened = lanes.open_lanes(n_shards, shard_tokens, {HELD_OUT: {}, TRAIN: markers}, [3])[TRAIN, 3]
        for number in range(opened.cursor.document, len(documents)):
            opened.feed(number, documents[number], record)
        return [*opened.shards(), *opened.shards(text_ended=True)]

    whole = texts({})
    assert [text.shard for text in whole] == list(range(3, LANES * 400, LANES))
    assert np.array_equal(np.concatenate([text.tokens for text in whole]), np.concatenate(documents))
    markers: dict[int, Any] = {}
    for done, text in enumerate(whole[:60], start=1):
        markers[text.shard] = namedtuple("Marker", "cursor")(asdict(text.cursor))
        resumed = texts(markers)
        assert [t.shard for t in resumed] == [t.shard for t in whole[done:]]
        for mine, theirs in zip(resumed[:70], whole[done:], strict=False):
            assert np.array_equal(mine.tokens, theirs.tokens)
            assert np.array_equal(mine.numbers, theirs.numbers)
            assert (mine.documents, mine.cursor) == (theirs.documents, theirs.cursor)


# --- row arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [HELD_OUT, TRAIN])
def test_row_c_seq_len_plus_p_is_the_models_activation_of_token_p_in_context_c(
    tiny_store: Path, tiny_model: NativeModel, split: str
) -> None:
    """Every context is run again alone; rows are read from the raw array, not by the shard reader."""
    import zarr

    store = ActivationStore.open(tiny_store)
    raw = zarr.open_array(tiny_store / "hooks" / HOOK_POINT / "acts", mode="r")
    checked = 0
    for shard in filled_shards(store, split)[::7]:
        contexts = store.read_contexts(split, shard)
        for i, tokens in enumerate(contexts.tokens):
            row = (contexts.first_context + i) * SEQ_LEN
            expected = tiny_model.capture(torch.from_numpy(tokens.astype(np.int64))[None], HOOK_POINT)[0].numpy()
            found = np.asarray(raw[row : row + SEQ_LEN]).astype(np.float32)
            np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-5)  # float16 on disk
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("split", [HELD_OUT, TRAIN])
def test_contexts_are_bos_and_documents_in_turn(tiny_store: Path, tiny_model: NativeModel, split: str) -> None:
    """Each run of one document number spells that document's own tokens, in order, after a BOS at its start."""
    store, documents = ActivationStore.open(tiny_store), by_id()
    spelled: dict[int, list[int]] = {}
    for shard in sorted(filled_shards(store, split)):  # within a lane shards ascend, so a document's parts are in order
        contexts = store.read_contexts(split, shard)
        for token, number in zip(contexts.tokens.ravel(), contexts.document.ravel(), strict=True):
            if number >= 0:
                spelled.setdefault(int(number), []).append(int(token))
    table = store.documents(split)
    assert spelled.keys() == table.keys()
    whole = 0
    for number, tokens in spelled.items():
        expected = [BOS, *tiny_model.tokenizer.encode(documents[table[number][0]].text).ids]
        assert tokens == expected[: len(tokens)]
        whole += len(tokens) == len(expected)
    assert split == HELD_OUT or whole > 10  # the budget cuts the last document of each lane, here every held-out one


def test_no_document_crosses_the_splits_and_each_is_where_its_hash_says(tiny_store: Path) -> None:
    store, documents = ActivationStore.open(tiny_store), by_id()
    held_out, train = store.documents(HELD_OUT), store.documents(TRAIN)
    assert held_out
    assert train
    assert not {entry[0] for entry in held_out.values()} & {entry[0] for entry in train.values()}
    for split, table in ((HELD_OUT, held_out), (TRAIN, train)):
        for document_id, source, domain, digest in table.values():
            document = documents[document_id]
            assert document.split == split
            assert (source, domain, digest) == (document.source, document.domain, sha256_of(document.text))


def test_bos_and_padding_are_stored_and_not_kept(tiny_store: Path) -> None:
    store = ActivationStore.open(tiny_store)
    for split in (HELD_OUT, TRAIN):
        n_bos = 0
        for shard in filled_shards(store, split):
            contexts = store.read_contexts(split, shard)
            assert np.array_equal(contexts.keep, (contexts.document >= 0) & (contexts.tokens != BOS))
            n_bos += int((contexts.tokens == BOS).sum())
        assert n_bos > 0
        marked = sum(marker.kept_rows for marker in store.markers(split).values())
        assert store.totals(split, HOOK_POINT).kept_rows == marked


def test_text_that_spells_the_bos_makes_none(tmp_path: Path, tiny_model: NativeModel) -> None:
    texts = [
        f"a <|endoftext|> inside {i}, <|endoftext|><|endoftext|> again " + "and more words " * 6 for i in range(300)
    ]
    source = text_source([Document(str(i), text, "d", "s") for i, text in enumerate(texts)])
    out = pipeline.harvest(tiny_model, source, tmp_path / "acts.zarr", tokens=1024, heldout_tokens=32)
    store = ActivationStore.open(out)
    for shard in filled_shards(store, TRAIN):
        contexts = store.read_contexts(TRAIN, shard)
        starts = np.diff(contexts.document.ravel(), prepend=-2) != 0
        inside = (contexts.tokens.ravel() == BOS) & ~starts
        assert not inside.any()


def test_a_model_without_bos_keeps_every_row_of_text(
    tmp_path: Path, tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model, "bos_id", None)
    source = text_source(made_up_documents(400))
    out = pipeline.harvest(tiny_model, source, tmp_path / "acts.zarr", tokens=1024, heldout_tokens=32)
    contexts = ActivationStore.open(out).read_contexts(TRAIN, 0)
    assert contexts.keep.all()
    assert not (contexts.tokens == BOS).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-7), ("float32", 1e-6)])
def test_several_hook_points_and_other_dtypes(
    tmp_path: Path, tiny_model: NativeModel, dtype: str, tolerance: float
) -> None:
    hook_points = [HOOK_POINT, "blocks.0.hook_resid_post"]
    out = pipeline.harvest(
        tiny_model,
        text_source(made_up_documents(400)),
        tmp_path / "acts.zarr",
        tokens=512,
        heldout_tokens=32,
        hook_points=hook_points,
        dtype=dtype,
        seq_len=16,
    )
    store = ActivationStore.open(out)
    contexts = store.read_contexts(TRAIN, 3)
    for hook_point in hook_points:
        expected = tiny_model.capture(torch.from_numpy(contexts.tokens.astype(np.int64)), hook_point).flatten(0, 1)
        np.testing.assert_allclose(
            store.read_acts(TRAIN, 3, hook_point), expected.numpy(), rtol=tolerance, atol=tolerance
        )


# --- resuming --------------------------------------------------------------------------------------------------------


class Stopping:
    """A store that asks to stop (as SIGTERM does, after the shard in hand) once `after` more shards are written."""

    def __init__(self, store: ActivationStore, after: int) -> None:
        self._store, self._left = store, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write_shard(self, *args: Any, **kwargs: Any) -> Any:
        import os
        import signal

        marker = self._store.write_shard(*args, **kwargs)
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return marker


def test_a_harvest_stopped_and_resumed_again_and_again_writes_the_same_bytes(
    tmp_path: Path, tiny_store: Path, tiny_model: NativeModel, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "acts.zarr"
    real, stops = harvesting.harvest, 0

    def harvest() -> None:
        pipeline.harvest(tiny_model, tiny_text, out, tokens=8192, heldout_tokens=1024)

    for after in (1, 40, 90, 3):
        monkeypatch.setattr(harvesting, "harvest", lambda m, s, sink, n=after, **k: real(m, s, Stopping(sink, n), **k))
        with pytest.raises(Interrupted, match="Repeat the command to continue"):
            harvest()
        stops += 1
        assert not ActivationStore.open(out).is_complete
    monkeypatch.setattr(harvesting, "harvest", real)
    harvest()
    assert stops == 4
    assert contents(out) == contents(tiny_store)


@pytest.mark.parametrize("gone", [[(TRAIN, 0)], [(TRAIN, 70), (TRAIN, 6)], [(HELD_OUT, 3), (TRAIN, 255), (TRAIN, 191)]])
def test_a_shard_whose_marker_is_gone_is_harvested_again_in_the_same_bytes(
    tmp_path: Path, tiny_store: Path, tiny_model: NativeModel, tiny_text: Path, gone: list[tuple[str, int]]
) -> None:
    out = Path(shutil.copytree(tiny_store, tmp_path / "acts.zarr"))
    for split, shard in gone:
        marker = out / "markers" / split / f"{shard:08d}.json"
        for name in json.loads(marker.read_text())["files"]:
            (out / name).unlink()
        marker.unlink()
    assert not ActivationStore.open(out).is_complete
    pipeline.harvest(tiny_model, tiny_text, out, tokens=8192, heldout_tokens=1024)
    assert contents(out) == contents(tiny_store)


def test_a_finished_harvest_repeated_does_nothing(
    tiny_store: Path, tiny_model: NativeModel, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tiny_store)
    monkeypatch.setattr(tiny_model, "capture_all", lambda *_: pytest.fail("the model was run"))
    pipeline.harvest(tiny_model, tiny_text, tiny_store, tokens=8192, heldout_tokens=1024)
    assert contents(tiny_store) == before


def test_other_settings_for_the_same_store_are_refused_and_change_nothing(
    tiny_store: Path, tiny_model: NativeModel, tiny_text: Path
) -> None:
    before = contents(tiny_store)
    with pytest.raises(ValueError, match="n_shards"):
        pipeline.harvest(tiny_model, tiny_text, tiny_store, tokens=4096, heldout_tokens=1024)
    with pytest.raises(ValueError, match="text_sha256"):
        pipeline.harvest(tiny_model, text_source(made_up_documents(9)), tiny_store, tokens=8192, heldout_tokens=1024)
    assert contents(tiny_store) == before


# --- text and disk that run out --------------------------------------------------------------------------------------


def test_text_shorter_than_the_budget_makes_a_finished_store_that_the_pipeline_can_use(
    tmp_path: Path, tiny_model: NativeModel
) -> None:
    """Every token of the text is there once; the rest of the shards are empty, and nothing downstream minds."""
    documents = made_up_documents(60)
    text = write_jsonl(tmp_path / "short.jsonl", documents)
    out = pipeline.harvest(tiny_model, text, tmp_path / "acts.zarr", tokens=6400, heldout_tokens=512)
    store = ActivationStore.open(out)
    assert store.is_complete
    assert store.verify() == []
    assert any(marker.contexts == 0 for marker in store.markers(TRAIN).values())
    for split in (HELD_OUT, TRAIN):
        texts = [d.text for d in documents if d.split == split]
        available = sum(len(tiny_model.tokenizer.encode(text).ids) for text in texts)
        kept = store.totals(split, HOOK_POINT).kept_rows
        asked = {TRAIN: 6400, HELD_OUT: 512}[split]
        assert 0.98 * min(available, asked - len(texts)) <= kept <= min(available, asked)  # a BOS takes a place too
    pipeline.train(out, tmp_path / "d", d_sae=40, tokens=2048, config={"k": 4, "batch_tokens": 256})
    result = pipeline.evaluate(tmp_path / "d", model=tiny_model)
    assert result["tokens"] == store.totals(HELD_OUT, HOOK_POINT).kept_rows
    assert pipeline.index(tmp_path / "d", model=tiny_model, tokens=100_000).is_dir()


def test_an_empty_tail_is_resumed_to_the_same_bytes(tmp_path: Path, tiny_model: NativeModel) -> None:
    source = text_source(made_up_documents(60))
    whole = pipeline.harvest(tiny_model, source, tmp_path / "a.zarr", tokens=6400, heldout_tokens=512)
    again = Path(shutil.copytree(whole, tmp_path / "b.zarr"))
    for marker in sorted((again / "markers" / TRAIN).glob("*.json"))[5::2]:
        marker.unlink()
    pipeline.harvest(tiny_model, source, again, tokens=6400, heldout_tokens=512)
    assert contents(again) == contents(whole)


def test_a_disk_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 10_000))
    out = tmp_path / "run" / "acts.zarr"
    with pytest.raises(pipeline.PipelineError, match="Lower --tokens"):
        pipeline.harvest(tiny_model, text_source(made_up_documents(9)), out, tokens=8192, heldout_tokens=1024)
    assert not out.parent.exists()


def test_the_forecast_is_what_the_store_takes(tiny_store: Path, tmp_path: Path) -> None:
    """Rows exactly; bytes of the arrays to the checksums' few bytes a shard."""
    plan = lanes.plan(8192, 1024, SEQ_LEN)
    forecast = pipeline.forecast_harvest(
        plan, {HOOK_POINT: SHAPE.d_mlp}, "float16", tmp_path / "not" / "there" / "acts.zarr"
    )
    store = ActivationStore.open(tiny_store)
    assert forecast.rows == sum(store.n_shards.values()) * store.rows_per_shard == 9216
    files = [p for p in tiny_store.rglob("*") if p.is_file() and p.suffix != ".json"]
    taken = sum(p.stat().st_size for p in files)
    assert forecast.disk_bytes == pytest.approx(taken, rel=0.01)


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "heldout_tokens", "seq_len"),
    [(1, 1, 1), (8192, 1024, 32), (2_000_000, 200_000, 256), (10**9, 262_144, 128)],
)
def test_a_plan_covers_its_budget_by_less_than_a_shard(tokens: int, heldout_tokens: int, seq_len: int) -> None:
    plan = lanes.plan(tokens, heldout_tokens, seq_len)
    shard = plan.contexts_per_shard * seq_len
    for split, budget in ((TRAIN, tokens), (HELD_OUT, heldout_tokens)):
        assert budget <= plan.tokens[split] < budget + shard + seq_len
        assert plan.n_shards[split] >= min(LANES, -(-budget // seq_len))
    assert 1 <= plan.contexts_per_shard <= max(1, lanes.SHARD_TOKENS // seq_len)


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-5, 1, 1), (1, 1, -5)])
def test_a_budget_of_nothing_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        lanes.plan(*arguments)


def test_a_context_longer_than_the_models_is_refused(tmp_path: Path, tiny_model: NativeModel) -> None:
    with pytest.raises(pipeline.PipelineError, match="seq_len = 64"):
        pipeline.harvest(tiny_model, text_source(made_up_documents(9)), tmp_path / "a.zarr", tokens=64, seq_len=64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_are_rounded_to_the_bits_that_the_store_would_round_them_to(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32) * 10.0 ** np.arange(-28, 4)
    values[0, :4] = [0.0, -0.0, 6e-8, 2.9e-8]  # the smallest of float16, and what rounds to zero
    assert np.array_equal(encode(harvesting._rounded(values, dtype), dtype), encode(values, dtype))


def test_rows_that_do_not_fit_are_left_for_the_store_to_name() -> None:
    values = np.array([[1.0, 1e5]], np.float32)
    assert harvesting._rounded(values, "float16") is values
