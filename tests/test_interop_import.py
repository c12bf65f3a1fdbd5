"""Imported dictionaries work like our own: evaluated, indexed, steered, browsed; also from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fakes import HOOK_POINT
from foreign_files import D_IN, dictionary_learning, llamascopium, nanda, openai, saelens, sparsify, weights

from browser.data import scan
from sae import pipeline
from sae.cli import main
from sae.dictionary.files import load
from sae.interop import hub
from sae.interop.files import InteropError
from sae.lm import NativeModel
from sae.pipeline.resolve import model_of, store_of
from store.features import FeatureIndex

WIDTH = 32  # of the tiny model's MLP


# --- as if ours ------------------------------------------------------------------------------------------------------


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    return dictionary_learning(tmp_path / "peer", weights(d_in=WIDTH, d_sae=14), "AutoEncoderTopK")


def test_an_imported_dictionary_is_evaluated_indexed_and_steered(
    tmp_path: Path, peer: Path, tiny_store: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "theirs"
    named = ["--model", str(tiny_model_dir), "--hook-point", HOOK_POINT]
    assert main(["import", str(peer), "--out", str(out), *named]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out)
    assert "dictionary-learning: 32 → 14 features (topk k=3)" in captured.err
    config = json.loads((out / "config.json").read_text())
    assert config["hook_point"] == HOOK_POINT
    assert config["model"]["sha256"] == NativeModel(tiny_model_dir, "tiny").weights_sha256
    assert config["imported"]["source"] == "peer"
    assert config["imported"]["config"]["trainer"]["lm_name"] == "EleutherAI/pythia-70m-deduped"

    with pytest.raises(pipeline.PipelineError, match="does not say which store"):
        pipeline.evaluate(out)
    result = pipeline.evaluate(out, store=tiny_store)
    assert result["metrics"]["l0"]["value"] == pytest.approx(3, abs=1e-6)
    index = FeatureIndex.open(pipeline.index(out, store=tiny_store, tokens=1024))
    assert index.attributes["d_in"] == WIDTH
    command = ["steer", str(out), "--feature", "5", "--set", "3x", "--prompt", "the", "--max-new-tokens", "4"]
    assert main(command) == 0
    assert "KL(steered" in capsys.readouterr().out
    assert [entry.id for entry in scan(tmp_path / "runs")] == ["theirs"]
    assert main(["info", str(out)]) == 0
    assert "dictionary-learning:AutoEncoderTopK" in capsys.readouterr().out


def test_an_export_imported_again_gives_the_same_figures(
    tmp_path: Path, peer: Path, tiny_store: Path, tiny_model_dir: Path
) -> None:
    pipeline.import_dictionary(peer, tmp_path / "a", model=str(tiny_model_dir), hook_point=HOOK_POINT)
    pipeline.export(tmp_path / "a", "sparsify", tmp_path / "out")
    pipeline.import_dictionary(tmp_path / "out", tmp_path / "back")  # hook point and model are in the files
    figures = [pipeline.evaluate(tmp_path / name, store=tiny_store)["metrics"] for name in ("a", "back")]
    assert figures[0] == figures[1]


def test_another_models_activations_are_refused(
    tmp_path: Path, peer: Path, tiny_store: Path, tiny_model_dir: Path
) -> None:
    """Without a hash of the weights, the named model must at least be the store's."""
    pipeline.import_dictionary(peer, tmp_path / "a", hook_point=HOOK_POINT)
    with pytest.raises(pipeline.PipelineError, match="the model named is tiny-relu-1l"):
        pipeline.evaluate(tmp_path / "a", store=tiny_store, model="tiny-relu-1l")
    sae = load(tmp_path / "a")
    assert model_of(sae, str(tiny_model_dir), store_of(sae, None, tiny_store)).id == str(tiny_model_dir)
    pipeline.import_dictionary(peer, tmp_path / "b", hook_point="blocks.0.hook_mlp_out")
    with pytest.raises(pipeline.PipelineError, match=r"the dictionary reads blocks.0.hook_mlp_out \(32 wide\)"):
        pipeline.evaluate(tmp_path / "b", store=tiny_store)


def test_a_model_of_another_width_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    peer = saelens(tmp_path / "peer", weights())
    with pytest.raises(pipeline.PipelineError, match=f"32 values at {HOOK_POINT}, the dictionary reads {D_IN}"):
        pipeline.import_dictionary(peer, tmp_path / "out", model=str(tiny_model_dir))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda path: sparsify(path / "layers.17", weights()), "blocks.17.hook_resid_post"),
        (lambda path: dictionary_learning(path, weights()), "blocks.3.hook_resid_post"),
        (lambda path: llamascopium(path, weights()), "blocks.5.hook_mlp_out"),
        (
            lambda path: saelens(path, weights(), metadata={"hook_name": "blocks.8.hook_resid_pre"}),
            "blocks.8.hook_resid_pre",
        ),
    ],
)
def test_dictionaries_of_a_bigger_models_residual_stream_or_mlp_output(tmp_path: Path, make: Any, place: str) -> None:
    pipeline.import_dictionary(make(tmp_path / "peer"), tmp_path / "out")
    sae = load(tmp_path / "out")
    assert sae.config["hook_point"] == place
    assert torch.isfinite(sae.reconstruct(torch.randn(3, D_IN))).all()


def test_a_missing_hook_point_is_asked_for(tmp_path: Path) -> None:
    file = openai(tmp_path / "peer", weights())
    with pytest.raises(pipeline.PipelineError, match="--hook-point blocks"):
        pipeline.import_dictionary(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipeline.import_dictionary(file, tmp_path / "out", hook_point="blocks.0.hook_mlp_out", format="openai")
    assert load(tmp_path / "out").config["hook_point"] == "blocks.0.hook_mlp_out"


def test_an_import_into_a_directory_with_files_is_refused(tmp_path: Path, peer: Path) -> None:
    with pytest.raises(pipeline.PipelineError, match="not empty"):
        pipeline.import_dictionary(peer, tmp_path, hook_point=HOOK_POINT)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub with one repository on this disk; the dictionary records the requests."""
    root = tmp_path / "hub"
    saelens(root / "res" / "blocks.8", weights())
    sparsify(root / "layers.3", weights())
    nanda(root, weights())
    (root / "README.md").write_text("a card")
    asked: dict[str, Any] = {}

    def list_repo_files(self: object, repo: str, *, revision: str | None = None) -> list[str]:
        asked.update(repo=repo, revision=revision)
        if repo != "owner/repo":
            raise OSError("404: no such repository")
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked["files"] = allow_patterns
        return str(root)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    ("spec", "files", "format"),
    [
        ("hub:owner/repo/res/blocks.8", ["res/blocks.8/cfg.json", "res/blocks.8/sae_weights.safetensors"], "sae-lens"),
        ("hub:owner/repo/layers.3/", ["layers.3/cfg.json", "layers.3/sae.safetensors"], "sparsify"),
        ("hub:owner/repo/25", ["25.pt", "25_cfg.json"], "nanda"),
        ("hub:owner/repo/25.pt@v1.0", ["25.pt", "25_cfg.json"], "nanda"),
        ("hub:owner/repo", ["25.pt", "25_cfg.json", "README.md"], "nanda"),
    ],
)
def test_one_dictionary_of_a_repository_is_fetched(
    tmp_path: Path, online: dict[str, Any], spec: str, files: list[str], format: str
) -> None:
    sae = pipeline.import_dictionary(spec, tmp_path / "out")
    assert online["files"] == files
    assert online["revision"] == ("v1.0" if "@" in spec else None)
    assert sae.config["imported"]["source"] == spec
    assert sae.config["imported"]["format"] == format


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            "hub:owner/repo/nowhere",
            r"no such path in the repository. Directories with weights: ., layers.3, res/blocks.8",
        ),
        ("hub:owner/other", "cannot be downloaded: 404"),
        ("hub:owner", "expected hub:owner/repo"),
        ("hub:owner/repo/../../x/y", "no such path in the repository"),
    ],
)
def test_a_missing_repository_or_path_is_named(tmp_path: Path, online: dict[str, Any], spec: str, reason: str) -> None:
    with pytest.raises(InteropError, match=reason):
        pipeline.import_dictionary(spec, tmp_path / "out")
    assert "files" not in online
    assert not (tmp_path / "out").exists()


def test_nothing_is_fetched_unless_the_hub_is_named(tmp_path: Path, online: dict[str, Any]) -> None:
    with pytest.raises(InteropError, match="no such file or directory"):
        pipeline.import_dictionary("owner/repo", tmp_path / "out")
    assert not online
    assert hub.files_of(["a/cfg.json", "a/b/cfg.json"], "a") == ["a/cfg.json"]
