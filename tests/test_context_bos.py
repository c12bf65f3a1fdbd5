"""Contexts that begin with BOS: what they hold, what a model with a sink gives, and which rule a store or run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import made_up_documents, text_source, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from sink_model import N_CTX

from sae import pipeline
from sae.lm import LanguageModel, NativeModel, load_model
from sae.pipeline.errors import PipelineError
from sae.text.packing import packed
from sae.training.live_rows import Contexts
from store.activations import ActivationStore
from store.common import BOS_BEFORE_CONTEXTS, BOS_BEFORE_DOCUMENTS, SPLITS, TRAIN, StoreError

BOS = 0
HOOK = "blocks.1.hook_resid_post"


def by_hand(tokens: list[int], seq_len: int) -> list[list[int]]:
    """The text in runs of seq_len − 1, each after a BOS, or after its own if it begins with one."""
    runs = [tokens[i : i + seq_len - 1] for i in range(0, len(tokens), seq_len - 1)]
    return [run if run[0] == BOS else [BOS, *run] for run in runs]


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(2, 9))
def test_every_context_is_one_bos_and_a_run_of_the_text(tokens: list[int], seq_len: int) -> None:
    found = packed(np.array(tokens, np.uint32), seq_len, BOS, context_bos=True)
    assert found.tokens.dtype == np.uint32
    expected = by_hand(tokens, seq_len)
    assert found.tokens.shape == found.keep.shape == found.place.shape == (len(expected), seq_len)
    for context, keep, place, run in zip(found.tokens, found.keep, found.place, expected, strict=True):
        assert context[: len(run)].tolist() == run
        assert place.tolist()[len(run) :] == [-1] * (seq_len - len(run))
        assert keep.tolist() == [token != BOS for token in run] + [False] * (seq_len - len(run))
        assert [tokens[p] for p in place[1 : len(run)]] == run[1:]
        assert place[0] in (place[1], place[1] - 1) or len(run) == 1


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 9))
def test_without_it_contexts_are_the_text_cut_anywhere(tokens: list[int], seq_len: int) -> None:
    found = packed(np.array(tokens, np.uint32), seq_len, BOS)
    assert found.tokens.ravel()[: len(tokens)].tolist() == tokens
    assert found.place.ravel()[: len(tokens)].tolist() == list(range(len(tokens)))
    assert (found.place.ravel()[len(tokens) :] == -1).all()
    assert found.keep.ravel().tolist() == [t != BOS for t in tokens] + [False] * (found.keep.size - len(tokens))


@pytest.fixture(scope="module")
def model(model_with_sink: tuple[Path, Any]) -> LanguageModel:
    return load_model(model_with_sink[0])


def harvest(model: LanguageModel | str, out: Path, **settings: Any) -> ActivationStore:
    sizes: dict[str, Any] = {"tokens": 4096, "heldout_tokens": 512, "dtype": "float32", "hook_points": [HOOK]}
    return ActivationStore.open(pipeline.harvest(model, text_source(made_up_documents(300)), out, **(sizes | settings)))


def shards(store: ActivationStore) -> list[tuple[str, int]]:
    return [(split, shard) for split in SPLITS for shard, marker in store.markers(split).items() if marker.contexts]


def kept_rows(store: ActivationStore) -> np.ndarray:
    return np.concatenate([store.read_acts(*s, HOOK)[store.read_contexts(*s).keep.reshape(-1)] for s in shards(store)])


@pytest.fixture(scope="module")
def store(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return harvest(model, tmp_path_factory.mktemp("bos") / "acts.zarr")


def test_rows_are_those_of_transformers_on_contexts_that_begin_with_bos(
    store: ActivationStore, model_with_sink: tuple[Path, Any]
) -> None:
    assert store.provenance["bos"] == BOS_BEFORE_CONTEXTS
    for place in shards(store)[::9]:
        contexts = store.read_contexts(*place)
        assert (contexts.tokens[:, 0] == BOS).all()
        assert not contexts.keep[:, 0].any()
        assert (contexts.tokens[:, 1] != BOS).all()
        expected = last_block(model_with_sink[1], torch.from_numpy(contexts.tokens.astype(np.int64)))
        np.testing.assert_allclose(
            store.read_acts(*place, HOOK).reshape(expected.shape), expected.numpy(), rtol=1e-5, atol=1e-4
        )


@torch.inference_mode()
def last_block(plain: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What the last block writes into the residual stream, by a torch hook on plain transformers."""
    seen: list[Any] = []
    handle = plain.transformer.h[1].register_forward_hook(lambda _, __, output: seen.append(output))
    plain(tokens)
    handle.remove()
    found: torch.Tensor = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return found


def test_each_document_is_spelled_whole_after_the_bos_of_contexts_are_left_out(
    store: ActivationStore, model: LanguageModel
) -> None:
    texts = {d.id: d.text for d in made_up_documents(300)}
    spelled: dict[int, list[int]] = {}
    for shard in store.markers(TRAIN):
        contexts = store.read_contexts(TRAIN, shard)
        for token, number in zip(contexts.tokens.ravel(), contexts.document.ravel(), strict=True):
            if number >= 0 and token != BOS:
                spelled.setdefault(int(number), []).append(int(token))
    table = store.documents(TRAIN)
    assert len(spelled) > 50
    for number, tokens in spelled.items():
        expected = model.tokenizer.encode(texts[table[number][0]], add_special_tokens=False).ids
        assert tokens == expected[: len(tokens)]


def test_the_sink_is_in_no_row_with_bos_and_in_many_without(
    store: ActivationStore, model: LanguageModel, tmp_path: Path
) -> None:
    def beyond_ten_medians(rows: np.ndarray) -> int:
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        return int((norms > 10 * np.median(norms)).sum())

    assert beyond_ten_medians(kept_rows(store)) == 0
    before = harvest(model, tmp_path / "acts.zarr", context_bos=False)
    assert before.provenance["bos"] == BOS_BEFORE_DOCUMENTS
    assert beyond_ten_medians(kept_rows(before)) > 50


def test_a_lost_shard_is_written_again_with_the_same_bytes(model: LanguageModel, tmp_path: Path) -> None:
    whole = harvest(model, tmp_path / "acts.zarr")
    before = {p: p.read_bytes() for p in sorted((tmp_path / "acts.zarr").rglob("*")) if p.is_file()}
    for split, shard in shards(whole)[3::5]:
        whole.forget(split, shard)
    harvest(model, tmp_path / "acts.zarr")
    assert {p: p.read_bytes() for p in sorted((tmp_path / "acts.zarr").rglob("*")) if p.is_file()} == before
    split, shard = shards(whole)[2]
    (tmp_path / "acts.zarr" / f"hooks/{HOOK}/acts/c").joinpath(f"{whole._number(split, shard)}/0").write_bytes(b"x")
    text = write_jsonl(tmp_path / "unused.jsonl", made_up_documents(3))
    found, left = pipeline.repair(tmp_path / "acts.zarr", model=model, text=text_source(made_up_documents(300)))
    assert (len(found), left, text.exists()) == (1, [], True)


def test_a_store_made_by_the_old_rule_keeps_it(model: LanguageModel, tmp_path: Path) -> None:
    old = harvest(model, tmp_path / "acts.zarr", context_bos=False)
    rows = kept_rows(old)
    old.forget(*shards(old)[4])
    assert np.array_equal(kept_rows(harvest(model, tmp_path / "acts.zarr")), rows)
    with pytest.raises(StoreError, match=r"provenance\.bos"):
        harvest(model, tmp_path / "acts.zarr", context_bos=True)


def test_models_of_sae_pretrain_keep_contexts_that_begin_anywhere(tiny_model: NativeModel, tmp_path: Path) -> None:
    hook = "blocks.0.mlp.hook_post"
    store = harvest(tiny_model, tmp_path / "a.zarr", hook_points=[hook], seq_len=16)
    assert store.provenance["bos"] == BOS_BEFORE_DOCUMENTS
    firsts = np.concatenate([store.read_contexts(*place).tokens[:, 0] for place in shards(store)])
    assert (firsts != BOS).mean() > 0.5
    asked = harvest(tiny_model, tmp_path / "b.zarr", hook_points=[hook], seq_len=16, context_bos=True)
    assert all((asked.read_contexts(*place).tokens[:, 0] == BOS).all() for place in shards(asked))


def test_a_model_without_bos_refuses_and_a_context_needs_room(
    tiny_model: NativeModel, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="leaves no room after the BOS"):
        harvest(model, tmp_path / "a.zarr", seq_len=1)
    monkeypatch.setattr(tiny_model, "bos_id", None)
    with pytest.raises(ValueError, match="has no BOS token to begin contexts with"):
        harvest(tiny_model, tmp_path / "a.zarr", context_bos=True)
    assert not (tmp_path / "a.zarr").exists()


def test_live_contexts_are_those_of_a_store(model: LanguageModel, tmp_path: Path) -> None:
    whole = harvest(model, tmp_path / "acts.zarr", tokens=40_000, heldout_tokens=4096)
    stored = np.concatenate([whole.read_contexts(TRAIN, s).tokens for s in whole.markers(TRAIN)])
    live = Contexts(model, text_source(made_up_documents(300)), N_CTX, context_bos=True)
    ours = np.concatenate([tokens for tokens, _ in live.epoch()])
    assert len(ours) > 300
    assert sorted(map(bytes, ours.astype(np.uint32))) == sorted(map(bytes, stored.astype(np.uint32)))


def test_a_live_run_records_its_rule_and_keeps_it(model: LanguageModel, tmp_path: Path) -> None:
    def train(out: Path, tokens: int = 2048, **settings: Any) -> Any:
        live = pipeline.Live(model, text_source(made_up_documents(300)), dtype="float32", **settings)
        how: dict[str, Any] = {"recipe": "topk", "d_sae": 8, "tokens": tokens, "hook_point": HOOK}
        return pipeline.train(live, out, config={"k": 2, "batch_tokens": 256}, **how)

    assert train(tmp_path / "new").config["live"]["bos"] == BOS_BEFORE_CONTEXTS
    with pytest.warns(UserWarning, match="of the variance"):  # the sink
        assert train(tmp_path / "old", context_bos=False).config["live"]["bos"] == BOS_BEFORE_DOCUMENTS
    assert train(tmp_path / "old").config["live"]["bos"] == BOS_BEFORE_DOCUMENTS  # repeated without naming the rule
    assert json.loads((tmp_path / "old" / "train.json").read_text())["rows"]["live"]["bos"] == BOS_BEFORE_DOCUMENTS
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train(tmp_path / "old", context_bos=True)


def test_a_store_whose_contexts_begin_otherwise_gives_a_warning(
    store: ActivationStore, model: LanguageModel, tmp_path: Path
) -> None:
    live = pipeline.Live(model, text_source(made_up_documents(300)), dtype="float32", context_bos=False)
    how: dict[str, Any] = {"recipe": "topk", "d_sae": 8, "tokens": 2048, "hook_point": HOOK}
    with pytest.warns(UserWarning, match="of the variance"):
        pipeline.train(live, tmp_path / "d", config={"k": 2, "batch_tokens": 256}, **how)
    with pytest.raises(PipelineError, match=r"--no-context-bos --out"):
        pipeline.evaluate(tmp_path / "d")
    with pytest.warns(UserWarning, match="begin with BOS, those that the dictionary was trained on begin anywhere"):
        pipeline.evaluate(tmp_path / "d", store=str(store.path))


def test_a_dictionary_records_how_the_contexts_of_its_store_begin(store: ActivationStore, tmp_path: Path) -> None:
    sae = pipeline.train(
        str(store.path), tmp_path / "d", recipe="topk", d_sae=8, tokens=2048, config={"k": 2, "batch_tokens": 256}
    )
    assert sae.config["store"]["bos"] == BOS_BEFORE_CONTEXTS
    out = pipeline.export(tmp_path / "d", "sae-lens", tmp_path / "out")
    assert json.loads((out / "cfg.json").read_text())["metadata"]["prepend_bos"] is True
