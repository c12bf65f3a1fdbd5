"""A model is identified by its parameters and what is computed with them, not by its path; old records are readable."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from fakes import HOOK_POINT, SHAPE, made_up_documents, text_source, write_jsonl, write_model
from test_hf_harvest import saved

from sae import pipeline
from sae.jobs.checkpoint import read_tensors, write_tensors
from sae.lm import LanguageModel, NativeModel, load_model
from sae.lm.identity import sha256_of_parameters
from sae.pipeline.lenses import snapshots_of
from store.activations import ActivationStore
from store.common import same_model

SIZE = {"tokens": 2048, "heldout_tokens": 2048}


def test_files_cut_otherwise_and_the_hub_are_the_same_model(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    plain = saved("gpt2", tmp_path / "one", tiny_model_dir / "tokenizer.json")
    shutil.copytree(tmp_path / "one", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    plain.save_pretrained(tmp_path / "cut", max_shard_size="10KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    one, cut = (load_model(tmp_path / name) for name in ("one", "cut"))
    real = TransformerBridge.boot_transformers
    monkeypatch.setattr(
        TransformerBridge, "boot_transformers", staticmethod(lambda _, **how: real(str(tmp_path / "one"), **how))
    )
    hub = load_model("some-owner/some-model")
    assert one.weights_sha256 == cut.weights_sha256 == hub.weights_sha256
    with torch.no_grad():
        next(plain.parameters())[0, 0] += 1
    plain.save_pretrained(tmp_path / "cut", max_shard_size="10KB")
    monkeypatch.undo()
    assert load_model(tmp_path / "cut").weights_sha256 != one.weights_sha256


def test_what_computes_with_the_parameters_is_part_of_a_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    tensors, header = read_tensors(tiny_model_dir / "model.safetensors")
    wide, other_heads = (Path(shutil.copytree(tiny_model_dir, tmp_path / name)) for name in ("wide", "heads"))
    write_tensors(wide / "model.safetensors", {name: t.float() for name, t in tensors.items()}, header)
    config = json.loads((other_heads / "config.json").read_text())
    assert (config["n_heads"], config["d_head"]) == (2, 8)
    (other_heads / "config.json").write_text(json.dumps(config | {"n_heads": 4, "d_head": 4}))
    same, float32, reshaped = (NativeModel(d, "m") for d in (tiny_model_dir, wide, other_heads))
    assert same.weights_sha256 == float32.weights_sha256  # 16 bits on disk or 32: the values are the same
    assert same.weights_sha256 != reshaped.weights_sha256  # the same numbers, other attention


def test_settings_added_later_leave_the_identity_of_older_models_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The hash by hand, over exactly the settings of version 0.1."""
    model = NativeModel(tiny_model_dir, "m")
    names = ("d_model", "d_mlp", "n_heads", "d_head", "n_layers", "n_ctx", "d_vocab", "act_fn")
    settings = {name: json.loads((tiny_model_dir / "config.json").read_text())[name] for name in names}
    parameters = sha256_of_parameters(model.module)
    expected = sha256(json.dumps([parameters, settings], sort_keys=True).encode()).hexdigest()
    assert model.weights_sha256 == expected
    attention = NativeModel(write_model(tmp_path / "attn", shape=replace(SHAPE, attn_only=True)), "a")
    assert attention.module.config.to_dict()["attn_only"] is True


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("tiny-relu-1l", "485ba6064c010b10687dd8861bc5e0390707d49615893634f446162510d4a487"),
        ("tiny-relu-1l-sparse", "620b57d656d0ab2740d97df6fd8d8f3203a6f0a7f4c5b3514cfd090ae163e741"),
        ("tiny-relu-1l-b", "e2d4549492cc349b85fffbbc8df4b4eb5e3505f8dcab755b009fb412a7dd806f"),
        ("tiny-relu-1l-b-sparse", "9e6c2df8ff8e95f42e4553cbbde5ea428e6cdfb135d3ab5354d2b7f0bd3c9dc7"),
        ("tiny-solu-1l", "17ddc8259d281684effaa37a6b841c29eaa7df45cabadd9535af93ca162f1f11"),
        ("attn-1l", "d00a6868990479da2054b44567a2ebc3e1d0cbffb285425f6527b2b1c8088a0e"),
        ("attn-2l", "40dc7cef161678510ad70585c846aaaacc22592f697d4b6895b7be9d859aa314"),
        ("tasks-4l", "7a2d36fa8e0e1c926f101530fd509a4ba49575df706883c2e2297e451d10697d"),
    ],
)
def test_shipped_models_keep_their_identity(name: str, recorded: str) -> None:
    """Stores and dictionaries of users hold these hashes."""
    assert load_model(name).weights_sha256 == recorded


def test_attn_2l_is_shipped_with_six_snapshots_and_matches_prefixes_only_in_the_later_ones() -> None:
    """Attention to the token after an earlier copy, by hand, on repeated random tokens; one layer stays at chance."""
    model = load_model("attn-2l")
    found = {each.tokens: each.open() for each in snapshots_of(model)}
    assert list(found) == [0, 2_457_600, 4_915_200, 5_734_400, 7_372_800, 12_288_000]
    assert found[12_288_000].weights_sha256 == model.weights_sha256
    segment = torch.arange(300, 900, 24)
    tokens = torch.cat([torch.tensor([model.bos_id]), segment, segment])[None]
    n = len(segment)

    def prefix(lm: LanguageModel) -> float:
        pattern = lm.attention(tokens, lm.n_layers - 1).pattern
        return float(pattern[:, torch.arange(n + 1, 2 * n), torch.arange(2, n + 1)].mean(-1).max())

    assert max(prefix(found[2_457_600]), prefix(found[0]), prefix(load_model("attn-1l"))) < 0.15
    assert min(prefix(found[7_372_800]), prefix(model)) > 0.3


@pytest.fixture
def old_store(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A store as version 0.1 wrote it: besides its model's hash it recorded that of the weight file."""
    text = write_jsonl(tmp_path / "t.jsonl", made_up_documents(1200))
    out = pipeline.harvest(str(tiny_model_dir), text, tmp_path / "acts.zarr", **SIZE)
    settings = json.loads((out / "zarr.json").read_text())
    of_file = sha256((tiny_model_dir / "model.safetensors").read_bytes()).hexdigest()
    settings["attributes"]["provenance"]["model"]["older_sha256"] = of_file
    (out / "zarr.json").write_text(json.dumps(settings))
    (out / "complete.json").unlink()
    ActivationStore.open(out).finish()
    return out


def test_a_store_of_version_0_1_is_used_and_repaired_as_before(
    old_store: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    pipeline.train(old_store, tmp_path / "d", d_sae=24, tokens=512, config={"k": 2, "batch_tokens": 128})
    assert pipeline.evaluate(tmp_path / "d")["metrics"]["l0"]["value"] > 0
    moved = shutil.copytree(tiny_model_dir, tmp_path / "moved")
    pipeline.evaluate(tmp_path / "d", model=str(moved))
    before = {file: file.read_bytes() for file in old_store.rglob("*") if file.is_file()}
    pipeline.harvest(str(moved), tmp_path / "t.jsonl", old_store, **SIZE)  # done already, and known for the same
    (old_store / "tokens" / "c" / "70" / "0").unlink()
    assert pipeline.repair(old_store)[1] == []
    assert {file: file.read_bytes() for file in old_store.rglob("*") if file.is_file()} == before
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(pipeline.PipelineError, match="trained on"):
        pipeline.evaluate(tmp_path / "d", model=str(other))


def test_a_store_of_version_0_1_is_merged_with_a_new_one(old_store: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    there = {document.text for document in made_up_documents(1200)}
    more = text_source([d for d in made_up_documents(2600, seed=3) if d.text not in there])
    pipeline.harvest(str(tiny_model_dir), more, tmp_path / "more.zarr", hook_points=[HOOK_POINT], **SIZE)
    pipeline.merge_stores([old_store, tmp_path / "more.zarr"], tmp_path / "both.zarr")
    both = ActivationStore.open(tmp_path / "both.zarr")
    rows = [ActivationStore.open(p).totals("train", HOOK_POINT).kept_rows for p in (old_store, tmp_path / "more.zarr")]
    assert both.totals("train", HOOK_POINT).kept_rows == sum(rows)


def test_identities_without_a_common_hash_are_of_two_models() -> None:
    new = {"id": "one", "sha256": "bb"}
    assert same_model(new, {"id": "moved", "sha256": "bb", "older_sha256": "cc"})  # two places, one model; version 0.1
    assert not same_model(new, {"id": "one", "sha256": "dd", "older_sha256": "bb"})
    assert not same_model({"sha256": "bb", "older_sha256": "cc"}, {"sha256": "dd", "older_sha256": "cc"})  # other heads
    assert not same_model({}, {})
    assert not same_model({"sha256": ""}, {"sha256": ""})
