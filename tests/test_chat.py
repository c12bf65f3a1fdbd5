"""Chats, token ids and special tokens: against the tokenizers of transformers, and through the whole pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_model import conversations, template_ids, write_instruct_model
from fakes import made_up_documents, random_sae

import sae
from sae import pipeline
from sae.cli import main
from sae.lm import LanguageModel, ModelError, NativeModel, load_model
from sae.text.sources import TextError, open_text
from store.activations import ActivationStore
from store.common import SPLITS

HOOK = "blocks.0.hook_resid_post"
QUESTION = [{"role": "user", "content": "the <|im_end|> fox?"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return write_instruct_model(tmp_path_factory.mktemp("instruct") / "model", tiny_model_dir / "tokenizer.json")


@pytest.fixture(scope="module")
def model(directory: Path) -> LanguageModel:
    return load_model(directory)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(directory)


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def harvested(model: LanguageModel, source: Any, out: Path) -> ActivationStore:
    """A small store, in which nothing is put before a context."""
    pipeline.harvest(
        model, source, out, tokens=8192, heldout_tokens=512, seq_len=32, hook_points=[HOOK], context_bos=False
    )
    return ActivationStore.open(out)


def tokens_by_document(store: ActivationStore) -> dict[str, list[int]]:
    """The token ids of every document in a store, BOS included; of those that fit into it whole or in part."""
    found: dict[str, list[int]] = {}
    for split in SPLITS:
        names = {number: record.id for number, record in store.documents(split).items()}
        lanes: dict[int, list[int]] = {}
        for shard in sorted(store.markers(split)):
            contexts = store.read_contexts(split, shard)
            for token, number in zip(contexts.tokens.flat, contexts.document.flat, strict=True):
                if number >= 0:
                    lanes.setdefault(int(number), []).append(int(token))
        found |= {names[number]: tokens for number, tokens in lanes.items()}
    return found


def agree(found: dict[str, list[int]], expected: dict[str, list[int]]) -> int:
    """Checks that every document found begins as expected; the number of those that are whole."""
    assert found
    for name, tokens in found.items():
        assert tokens == expected[name][: len(tokens)]
    return sum(found[name] == expected[name] for name in found)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [QUESTION, *conversations(3)])
def test_a_chat_prompt_is_what_the_models_own_tokenizer_makes_of_it(
    messages: list[dict[str, str]], model: LanguageModel, directory: Path
) -> None:
    assert model.encode_prompt(messages) == template_ids(directory, messages, reply=True)


@pytest.mark.parametrize("text", ["<|im_start|>user\nfox<|im_end|>\n", "plain", "<|endoftext|>the", "a<|endoftext|>"])
def test_special_tokens_in_a_prompt_are_read_only_when_asked_for(
    text: str, model: LanguageModel, reference: Any
) -> None:
    special = reference(text, add_special_tokens=False)["input_ids"]
    bos = [] if special[0] == model.bos_id else [model.bos_id]
    assert model.encode_prompt(text, special_tokens=True) == [*bos, *special]
    literal = model.encode_prompt(text)
    assert literal[0] == model.bos_id
    assert not set(literal[1:]) & set(reference.all_special_ids)
    assert reference.decode(literal[1:]) == text


def test_a_model_without_a_template_says_so(tmp_path: Path, tiny_model_dir: Path, tiny_model: NativeModel) -> None:
    plain = load_model(write_instruct_model(tmp_path / "base", tiny_model_dir / "tokenizer.json", template=None))
    for lm in (plain, tiny_model):
        with pytest.raises(ModelError, match="has no chat template"):
            lm.encode_prompt(QUESTION)
        path = write_lines(tmp_path / "chats.jsonl", [{"messages": QUESTION}])
        with pytest.raises(TextError, match="holds chat messages: .*has no chat template"):
            pipeline.harvest(lm, path, tmp_path / "acts.zarr", tokens=64)
        assert not (tmp_path / "acts.zarr").exists()


# --- chats as text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["jsonl", "parquet"])
def test_every_chat_in_a_store_is_what_the_template_makes_of_it(
    packing: str, model: LanguageModel, directory: Path, tmp_path: Path
) -> None:
    chats = conversations(120)
    records: list[dict[str, Any]] = [{"id": f"chat-{i}", "messages": chat} for i, chat in enumerate(chats)]
    if packing == "jsonl":
        path = write_lines(tmp_path / "chats.jsonl", records)
    else:
        for record in records[:5]:  # an empty field that other rows have must not reach the template
            record["messages"][0] = record["messages"][0] | {"name": "someone"}
        path = tmp_path / "chats.parquet"
        pq.write_table(pa.Table.from_pylist(records), path)
    store = harvested(model, path, tmp_path / "acts.zarr")
    expected = {f"chat-{i}": template_ids(directory, chat) for i, chat in enumerate(chats)}
    assert agree(tokens_by_document(store), expected) > 25


def test_rows_of_turn_markers_are_kept_and_recorded(model: LanguageModel, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in conversations(120)])
    store = harvested(model, path, tmp_path / "acts.zarr")
    marker, kept = model.tokenizer.token_to_id("<|im_start|>"), 0
    for shard in sorted(store.markers("train")):
        contexts = store.read_contexts("train", shard)
        np.testing.assert_array_equal(contexts.keep, (contexts.document >= 0) & (contexts.tokens != model.bos_id))
        kept += int((contexts.keep & (contexts.tokens == marker)).sum())
    assert kept > 100
    assert store.provenance["special_tokens"] == {"in_text": False, "in_chats": True, "in_token_ids": False}
    assert "token 0 (BOS)" in store.provenance["special_token_rows"]
    assert len(store.provenance["chat_template_sha256"]) == 64


def test_a_chat_that_the_template_refuses_is_counted(model: LanguageModel, tmp_path: Path) -> None:
    chats: list[dict[str, Any]] = [{"messages": chat} for chat in conversations(5)]
    chats += [{"messages": [{"role": "tool", "content": "x"}]}, {"messages": "no"}, {"messages": []}]
    source = open_text(write_lines(tmp_path / "chats.jsonl", chats)).for_model(model)
    assert len(list(source.documents())) == 5
    assert (source.report.broken_lines, source.report.empty) == (2, 1)
    assert any("no role tool" in problem for problem in source.report.first_problems)
    with pytest.raises(TextError, match="no role tool"):
        open_text(write_lines(tmp_path / "all.jsonl", chats[5:6])).for_model(model)


def test_chats_cannot_train_a_tokenizer(tmp_path: Path) -> None:
    source = open_text(write_lines(tmp_path / "chats.jsonl", [{"messages": QUESTION}]))
    with pytest.raises(TextError, match="holds chat messages, which only an existing model's tokenizer can read"):
        list(source.documents())


def test_special_tokens_in_a_text_are_read_when_asked_for(model: LanguageModel, reference: Any, tmp_path: Path) -> None:
    texts = {d.id: f"<|im_start|>{d.text}<|im_end|>" for d in made_up_documents(150)}
    path = write_lines(tmp_path / "a.jsonl", [{"id": name, "text": text} for name, text in texts.items()])
    literal = {name: [0, *model.tokenizer.encode(text, add_special_tokens=False).ids] for name, text in texts.items()}
    special = {name: [0, *reference(text, add_special_tokens=False)["input_ids"]] for name, text in texts.items()}
    assert agree(tokens_by_document(harvested(model, path, tmp_path / "literal.zarr")), literal) > 20
    source = pipeline.source_of(path, special_tokens=True)
    store = harvested(model, source, tmp_path / "special.zarr")
    assert agree(tokens_by_document(store), special) > 20
    assert store.provenance["special_tokens"]["in_text"]
    found, left = pipeline.repair(store.path, model=model)
    assert (found, left) == ([], [])


# --- token ids -------------------------------------------------------------------------------------------------------


def id_records(model: LanguageModel, n: int = 150) -> list[dict[str, Any]]:
    return [
        {"id": d.id, "input_ids": model.tokenizer.encode(d.text, add_special_tokens=False).ids}
        for d in made_up_documents(n)
    ]


def test_token_ids_are_used_as_they_are(model: LanguageModel, tmp_path: Path) -> None:
    records = id_records(model)
    expected = {record["id"]: record["input_ids"] for record in records}
    for record in records:
        record["attention_mask"] = [1] * len(record["input_ids"]) + [0, 0]
        record["input_ids"] = [*record["input_ids"], 301, 301]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "ids.parquet")
    store = harvested(model, tmp_path / "ids.parquet", tmp_path / "acts.zarr")
    assert agree(tokens_by_document(store), expected) > 20
    recorded = store.provenance["token_ids"]
    assert recorded["tokenizer_tokens"] == 302
    assert recorded["checked_documents"] == 64
    assert recorded["share_that_came_back"] > 0.99


def test_token_ids_are_in_the_split_of_their_text(model: LanguageModel, tmp_path: Path) -> None:
    records = id_records(model)
    for record in records[::2]:
        record["input_ids"] = [model.bos_id, *record["input_ids"]]
    source = open_text(write_lines(tmp_path / "ids.jsonl", records)).for_model(model)
    assert {d.id: d.split for d in source.documents()} == {d.id: d.split for d in made_up_documents(150)}


@pytest.mark.parametrize("wrong", [302, 307, -1, 2**70])
def test_an_id_that_is_no_token_is_refused(wrong: int, model: LanguageModel, tmp_path: Path) -> None:
    """302 … 307 have an embedding row, but no token."""
    records = id_records(model)
    records[107]["input_ids"][3] = wrong  # not in the sample that is encoded again
    path = write_lines(tmp_path / "ids.jsonl", records)
    with pytest.raises(TextError, match=f"doc-107: {wrong} is not a token id of this model, whose tokenizer has 302"):
        pipeline.harvest(model, path, tmp_path / "acts.zarr", tokens=64)
    assert not (tmp_path / "acts.zarr").exists()


def test_ids_of_another_tokenizer_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    """The same vocabulary size, other merges: every id is a token, but the text is another one."""
    from sae.text.tokenizer import train_tokenizer

    other = train_tokenizer([Path(str(sae.__file__)).read_text()], 302)
    records = [{"input_ids": other.encode(d.text).ids} for d in made_up_documents(150)]
    with pytest.raises(TextError, match=r"not made with the tokenizer of .*came back, expected at least 95%"):
        pipeline.harvest(model, write_lines(tmp_path / "ids.jsonl", records), tmp_path / "acts.zarr", tokens=64)
    assert not (tmp_path / "acts.zarr").exists()


# --- steering and the whole pipeline ---------------------------------------------------------------------------------


def test_a_chat_prompt_is_steered_in_the_models_own_format(
    model: LanguageModel, directory: Path, reference: Any
) -> None:
    found = sae.steer(model, random_sae(16, HOOK), QUESTION, [sae.Edit(3, "scale", 2.0)], max_new_tokens=5)
    assert found.prompt_ids == template_ids(directory, QUESTION, reply=True)
    for ids, text in ((found.base_ids, found.base_text), (found.steered_ids, found.steered_text)):
        assert found.prompt_text + text == reference.decode(found.prompt_ids + ids)


def test_an_instruct_model_from_chats_to_steering(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in conversations(900)])
    store, out = str(tmp_path / "acts.zarr"), str(tmp_path / "d")
    harvest = ["harvest", "--model", str(directory), "--text", str(chats), "--out", store, "--hook-point", HOOK]
    assert main([*harvest, "--tokens", "8192", "--heldout-tokens", "1024", "--seq-len", "32"]) == 0
    assert "900 documents" in capsys.readouterr().err
    train = ["train", "--acts", store, "--recipe", "topk", "--d-sae", "48", "--out", out, "--tokens", "16384"]
    assert main([*train, "--batch-tokens", "512", "--set", "k=4"]) == 0
    assert main(["eval", out]) == 0
    assert main(["index", out]) == 0
    metrics = json.loads((tmp_path / "d" / "eval.json").read_text())["metrics"]
    assert 0 < metrics["fvu"]["value"] < 1
    capsys.readouterr()
    steer = ["steer", out, "--feature", "1", "--set", "2x", "--prompt", "why?", "--max-new-tokens", "4", "--json"]
    assert main([*steer, "--chat"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompt_ids"] == template_ids(directory, [{"role": "user", "content": "why?"}], reply=True)
    assert told["prompt_text"] == "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    marked = [*(word if word != "why?" else "<|im_start|>why?" for word in steer), "--special-tokens"]
    assert main(marked) == 0
    assert 301 in json.loads(capsys.readouterr().out)["prompt_ids"]
