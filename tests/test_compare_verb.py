"""`sae compare` end to end: seeds on one store, two models that share a tokenizer, and models that do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import HOOK_POINT, SHAPE, made_up_documents, write_model

from sae import pipeline
from sae.cli import main
from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import save
from sae.lm import NativeModel
from sae.text.tokenizer import train_tokenizer
from store.common import write_json

D_IN, D_SAE = SHAPE.d_mlp, 24


def write_dictionary(
    directory: Path, model: Path, *, seed: int, d_sae: int = D_SAE, store: str = "../acts.zarr"
) -> Path:
    """A dictionary of random unit features of that model, ReLU above a bias that leaves it sparse."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(D_IN, d_sae)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, D_IN, generator=generator), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-0.5)
    identity = NativeModel(model, str(model)).identity()
    config = {"recipe": "made up", "hook_point": HOOK_POINT, "model": identity, "store": {"path": store}}
    return save(sae, directory, config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_store: Path) -> Path:
    root = tmp_path_factory.mktemp("compare") / "runs"
    (root / "a").mkdir(parents=True)
    (root / "a" / "acts.zarr").symlink_to(tiny_store)
    write_dictionary(root / "a" / "s0", tiny_model_dir, seed=0)
    write_dictionary(root / "a" / "s1", tiny_model_dir, seed=1, d_sae=40)
    other = write_model(root.parent / "other", seed=1)
    (other / "tokenizer.json").write_bytes((tiny_model_dir / "tokenizer.json").read_bytes())
    write_dictionary(root / "b" / "s0", other, seed=0)
    return root


def test_two_seeds_on_one_store(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "a" / "s0"), str(runs / "a" / "s1"), "--tokens", "1500"]) == 0
    out = capsys.readouterr().out
    assert "features_a_to_b" in out
    assert "0.72" in out  # the value in the paper
    directory = runs / "a" / "s0" / "compare" / "a--s1"
    result = json.loads((directory / "compare.json").read_text())
    assert result["same_space"]
    assert result["a"]["name"] == "a/s0"
    table = pd.read_parquet(directory / "features_a.parquet")
    assert len(table) == D_SAE
    assert len(pd.read_parquet(directory / "features_b.parquet")) == 40
    edges = pd.read_parquet(directory / "edges.parquet")
    assert set(edges) == {"a", "b", "correlation", "masked_a", "masked_b", "masked", "cosine"}
    sae_a, sae_b = (torch.nn.functional.normalize(pipeline_weights(runs / "a" / s), dim=-1) for s in ("s0", "s1"))
    best = (sae_a @ sae_b.T).max(1)
    np.testing.assert_array_equal(table["cosine_best"], best.indices)
    np.testing.assert_allclose(table["cosine"], best.values, atol=1e-6)
    assert result["counts"]["a"]["analysed"] == (table["firings"] >= result["min_firings"]).sum()
    assert table["best"].isna().sum() == D_SAE - result["counts"]["a"]["analysed"]
    assert 1000 < result["tokens"] <= 2048  # kept ones of the shards that hold 1,500


def pipeline_weights(directory: Path) -> torch.Tensor:
    from sae.dictionary.files import load

    return load(directory).W_dec


def test_two_models_that_share_a_tokenizer(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B's activations come from running B's model on A's tokens; a dictionary matches itself in either store."""
    out = runs.parent / "ab"
    dictionaries = [str(runs / name / "s0") for name in ("a", "b")]
    assert main(["compare", *dictionaries, "--tokens", "1500", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert not result["same_space"]
    assert result["a"]["model"]["sha256"] != result["b"]["model"]["sha256"]
    assert result["summary"]["neurons_a_to_b"]["n"] > 0
    assert result["summary"]["logits"]["n"] == result["counts"]["a"]["analysed"]
    assert result["summary"]["decoder_a_to_b"]["n"] == 0
    table = pd.read_parquet(out / "features_a.parquet")
    assert table["cosine"].isna().all()
    again = write_dictionary(runs / "c" / "s0", Path(result["b"]["model"]["id"]), seed=0)
    found = pipeline.compare(again, runs / "b" / "s0", store=live_store(runs, result["b"]["model"]["id"]), tokens=512)
    assert found["summary"]["features_a_to_b"]["median"] == pytest.approx(1, abs=1e-3)


def live_store(runs: Path, model: str) -> Path:
    out = runs / "b" / "acts.zarr"
    text = runs.parent / "text.jsonl"
    if not out.exists():
        from fakes import write_jsonl

        write_jsonl(text, made_up_documents(600))
        pipeline.harvest(model, text, out, tokens=512, heldout_tokens=512)
    return out


def test_another_tokenizer_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_model(runs.parent / "stranger", seed=2)
    train_tokenizer((d.text[::-1] for d in made_up_documents(300, seed=4)), SHAPE.d_vocab).save(
        str(other / "tokenizer.json")
    )
    stranger = write_dictionary(runs / "d" / "s0", other, seed=0)
    assert main(["compare", str(runs / "a" / "s0"), str(stranger)]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert not (runs / "a" / "s0" / "compare" / "d--s0").exists()


def test_dictionaries_with_too_many_activations_are_refused_early(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.analysis.comparison.MAX_ACTIVATIONS", 100)
    with pytest.raises(ValueError, match="Give fewer --tokens"):
        pipeline.compare(runs / "a" / "s0", runs / "a" / "s1", out=runs / "nowhere")
    assert not (runs / "nowhere").exists()


def test_a_dictionary_against_itself_finds_itself(runs: Path) -> None:
    found = pipeline.compare(runs / "a" / "s0", runs / "a" / "s0", out=runs / "self")
    table = pd.read_parquet(runs / "self" / "features_a.parquet").dropna(subset="best")
    assert len(table) > 3
    np.testing.assert_array_equal(table["best"], table["feature"])
    np.testing.assert_array_equal(table["matched"], table["feature"])
    np.testing.assert_allclose(table["correlation"], 1)
    np.testing.assert_allclose(table["logit_correlation"], 1, atol=1e-5)
    assert found["summary"]["shuffled"]["p95"] < 0.5
    write_json(runs / "copy.json", found)  # JSON has no NaN: this refuses one
