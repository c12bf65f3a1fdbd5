"""Exports: the native layout reads back the same, the SAELens layout has what its loader asks for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae import pipeline
from sae.model import SAE, load, save

CHECK = Path(__file__).resolve().parent.parent / "scripts" / "check_saelens.py"
D_IN, D_SAE, K = 12, 40, 5


@pytest.fixture(params=["relu", "topk"])
def dictionary(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dictionary with random parameters, as training leaves it on disk."""
    sae = SAE(D_IN, D_SAE, activation=request.param, k=K if request.param == "topk" else None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    config = {
        "recipe": "towards-monosemanticity" if request.param == "relu" else "topk",
        "hook_point": "blocks.0.mlp.hook_post",
        "model": {"id": "tiny", "kind": "native-transformer", "sha256": "0" * 64},
        "store": {"path": "../acts.zarr", "text": "made up"},
        "train": {"tokens": 1000, "recipe": "x"},
    }
    return save(sae, tmp_path / "native", config)


def by_formula(tensors: dict[str, torch.Tensor], x: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode and decode in float64, from the tensors of a file alone."""
    W_enc, b_enc, W_dec, b_dec = (tensors[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    acts = ((x.double() - b_dec) @ W_enc + b_enc).relu()
    if k:
        acts = acts * (acts >= acts.topk(k, dim=-1).values[:, -1:])
    return acts, acts @ W_dec + b_dec


def test_the_native_export_reads_back_the_same(dictionary: Path, tmp_path: Path) -> None:
    out = pipeline.export(dictionary, "native", tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"sae.safetensors", "config.json"}
    assert (out / "sae.safetensors").read_bytes() == (dictionary / "sae.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((dictionary / "config.json").read_text())
    x = torch.randn(9, D_IN)
    assert torch.equal(load(out).encode(x), load(dictionary).encode(x))


def test_the_sae_lens_export_has_the_files_and_keys_its_loader_asks_for(dictionary: Path, tmp_path: Path) -> None:
    out = pipeline.export(dictionary, "sae-lens", tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    topk = load(dictionary).activation == "topk"
    config = json.loads((out / "cfg.json").read_text())
    metadata = config.pop("metadata")
    expected = {
        "architecture": "topk" if topk else "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
    } | ({"k": K, "rescale_acts_by_decoder_norm": False} if topk else {})  # fmt: skip
    assert config == expected
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6  # else the loader loses hook_name
    assert metadata["hook_name"] == "blocks.0.mlp.hook_post"
    assert metadata["model_name"] == "tiny"
    assert metadata["dataset_path"] == "made up"
    assert metadata["prepend_bos"] is True
    tensors = load_file(out / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,),
    }  # fmt: skip
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_the_exported_numbers_do_what_the_dictionary_does(dictionary: Path, tmp_path: Path) -> None:
    """By its documented formula (pre-bias subtracted, ReLU of all or of the k largest), in float64."""
    out = pipeline.export(dictionary, "sae-lens", tmp_path / "out")
    sae = load(dictionary)
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(4))
    acts, x_hat = by_formula(load_file(out / "sae_weights.safetensors"), x, sae.k)
    assert (sae.encode(x) - acts).abs().max() <= 1e-4
    assert (sae.reconstruct(x) - x_hat).abs().max() <= 1e-4
    if sae.k:
        assert ((sae.encode(x) > 0).sum(-1) <= K).all()


def test_an_export_into_a_directory_with_files_is_refused(dictionary: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(pipeline.PipelineError, match="not empty"):
        pipeline.export(dictionary, "sae-lens", out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_an_export_to_a_place_that_is_a_file_is_refused(dictionary: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    with pytest.raises(pipeline.PipelineError, match="file"):
        pipeline.export(dictionary, "native", out)
    assert out.read_text() == "mine"


def test_an_unknown_format_is_refused_with_those_there_are(dictionary: Path, tmp_path: Path) -> None:
    with pytest.raises(pipeline.PipelineError, match="native, sae-lens; got 'pickle'"):
        pipeline.export(dictionary, "pickle", tmp_path / "out")


def test_the_check_with_sae_lens_itself_uses_none_of_our_code() -> None:
    """Else it would need our environment, and would compare us with ourselves."""
    tree = ast.parse(CHECK.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "sae_lens" in names
    assert not {name.split(".")[0] for name in names} & {"sae", "store", "browser"}


@pytest.mark.skipif(find_spec("sae_lens") is not None, reason="sae-lens is installed here")
def test_the_check_with_sae_lens_itself_does_not_pass_where_that_is_missing() -> None:
    done = subprocess.run([sys.executable, CHECK, "exported", "native"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "sae-lens" in done.stderr
    assert "Traceback" not in done.stderr
