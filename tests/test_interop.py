"""Exports: every layout is read back unchanged, SAELens' has what its loader needs, and the rest is refused."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sae import pipeline
from sae.dictionary.autoencoder import ACTIVATIONS, SAE
from sae.dictionary.files import load, save
from sae.interop import registry, saelens
from sae.interop.files import InteropError
from store.common import BOS_BEFORE_CONTEXTS, BOS_BEFORE_DOCUMENTS

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
D_IN, D_SAE, K = 12, 40, 5


@pytest.fixture(params=["relu", "topk"])
def dictionary(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dictionary with random parameters, saved as after training."""
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
    assert "path" not in json.dumps(metadata["monosem"])  # no path of this machine is exported
    expected = {
        "architecture": "topk" if topk else "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    } | ({"k": K, "rescale_acts_by_decoder_norm": False} if topk else {})
    assert config == expected
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6  # otherwise the loader loses hook_name
    assert metadata["hook_name"] == "blocks.0.mlp.hook_post"
    assert metadata["model_name"] == "tiny"
    assert metadata["dataset_path"] == "made up"
    assert metadata["prepend_bos"] is False  # its store says nothing of a BOS at the start of contexts
    tensors = load_file(out / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
    }
    assert all(t.dtype == torch.float32 for t in tensors.values())


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({"store": {"text": "t", "bos": BOS_BEFORE_CONTEXTS}}, True),
        ({"store": {"text": "t"}}, False),
        ({"live": {"text": "t", "bos": BOS_BEFORE_CONTEXTS}}, True),
        ({"live": {"text": "t", "bos": BOS_BEFORE_DOCUMENTS}}, False),
        ({}, True),  # not known: their own default
        ({"store": {"text": "t"}, "model": {"id": "m", "kind": "arrays"}}, True),  # not known either
        ({"imported": {"config": {"prepend_bos": False}}}, False),
        ({"imported": {"config": {"metadata": {"prepend_bos": False}}}}, False),
    ],
)
def test_prepend_bos_is_true_to_the_contexts_of_training(origin: dict, expected: bool) -> None:
    sae = SAE(D_IN, D_SAE)
    sae.config = origin
    assert saelens.config_of(sae)["metadata"]["prepend_bos"] is expected


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


def test_an_export_to_the_path_of_a_file_is_refused(dictionary: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    with pytest.raises(pipeline.PipelineError, match="file"):
        pipeline.export(dictionary, "native", out)
    assert out.read_text() == "mine"


def test_an_unknown_format_is_refused_with_a_list_of_formats(dictionary: Path, tmp_path: Path) -> None:
    with pytest.raises(pipeline.PipelineError, match="native, sae-lens, .*; got 'pickle'"):
        pipeline.export(dictionary, "pickle", tmp_path / "out")


def test_the_commands_formats_are_the_pipelines() -> None:
    export, import_dictionary = (import_module(f"sae.cli.{name}") for name in ("export", "import_dictionary"))
    assert export.EXPORT_FORMATS == pipeline.EXPORT_FORMATS
    assert import_dictionary.IMPORT_FORMATS == pipeline.IMPORT_FORMATS


# --- there and back --------------------------------------------------------------------------------------------------


def random_dictionary(
    activation: str,
    seed: int = 0,
    *,
    d_in: int = D_IN,
    d_sae: int = D_SAE,
    scale: float = 1.0,
    unit_norms: bool = True,
    **shape: Any,
) -> SAE:
    """Random tensors; a batchtopk has one threshold for all features, as it is trained."""
    sae = SAE(d_in, d_sae, activation=activation, k=K if "topk" in activation else None, **shape).eval()
    g = torch.Generator().manual_seed(seed)
    for name, tensor in sae.tensors().items():
        tensor.copy_(torch.randn(tensor.shape, generator=g) * scale)
        if name == "threshold":
            tensor.copy_(tensor.abs() if activation == "jumprelu" else torch.full_like(tensor, 0.3 * scale))
    if unit_norms:
        sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data, dim=-1)
    sae.config = {
        "recipe": "made up",
        "hook_point": "blocks.2.hook_resid_post",
        "train": {"tokens": 7, "lr": 1e-3},
        "model": {"id": "owner/model", "sha256": "0" * 64, "kind": "transformer-bridge"},
        "store": {"path": "../a"},
    }
    return sae.requires_grad_(False)


EXACT = {  # exported and imported again with every number unchanged
    "sae-lens": ACTIVATIONS,
    "dictionary-learning": ACTIVATIONS,
    "sparsify": ("topk",),
}


@settings(max_examples=25, deadline=None)
@given(
    case=st.sampled_from([(format, activation) for format, kinds in EXACT.items() for activation in kinds]),
    d_in=st.integers(1, 9),
    d_sae=st.integers(K, 30),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_an_exported_dictionary_is_imported_unchanged(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[str, str], d_in: int, d_sae: int, scale: float, seed: int
) -> None:
    format, activation = case
    plain = activation == "jumprelu" and format == "dictionary-learning"  # subtracts nothing from its input there
    sae = random_dictionary(activation, seed, d_in=d_in, d_sae=d_sae, scale=scale, pre_bias=not plain)
    back = registry.read(pipeline.export(sae, format, tmp_path_factory.mktemp("peer") / "out"))
    assert back.shape == sae.shape
    for name, tensor in sae.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name
    for name in ("recipe", "hook_point", "train", "model"):
        assert back.config[name] == sae.config[name]
    assert "store" not in back.config
    assert back.config["imported"]["format"] == format


@pytest.mark.parametrize("format", ["sae-lens", "dictionary-learning"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_without_a_pre_bias(tmp_path: Path, format: str, activation: str) -> None:
    sae = random_dictionary(activation, pre_bias=False)
    back = registry.read(pipeline.export(sae, format, tmp_path / "out"))
    x = torch.randn(50, D_IN)
    assert not back.pre_bias
    assert torch.equal(back.encode(x), sae.encode(x))


@pytest.mark.parametrize(("activation", "unit_norms"), [("relu", False), ("jumprelu", True), ("batchtopk", True)])
def test_what_a_class_of_dictionary_learning_would_change_is_exported_as_another_class(
    tmp_path: Path, activation: str, unit_norms: bool
) -> None:
    """Its AutoEncoder is rescaled on loading, its JumpReLU has no pre-bias, its BatchTopK one threshold for all."""
    sae = random_dictionary(activation, unit_norms=unit_norms)
    if activation == "batchtopk":
        sae.threshold[3] = 0.7
    out = pipeline.export(sae, "dictionary-learning", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    x = 3 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(1))
    back = registry.read(out)
    for theirs, ours in ((back.encode(x), sae.encode(x)), (back.reconstruct(x), sae.reconstruct(x))):
        assert (theirs - ours).abs().max() <= 1e-5 * max(1, ours.abs().max())


@pytest.mark.parametrize(
    ("format", "sae", "reason"),
    [
        *(("sparsify", random_dictionary(name), "takes the k largest") for name in ACTIVATIONS if name != "topk"),
        ("sparsify", random_dictionary("topk", pre_bias=False), "takes the k largest"),
        ("dictionary-learning", random_dictionary("topk", pre_bias=False), "subtracts the decoder bias"),
        ("dictionary-learning", random_dictionary("gated", pre_bias=False), "subtracts the decoder bias"),
        ("dictionary-learning", random_dictionary("relu", d_out=3, pre_bias=False), "transcoder"),
        ("sae-lens", random_dictionary("relu", d_out=3, pre_bias=False), "transcoder"),
        ("sae-lens", random_dictionary("relu", skip=True), "transcoder"),
    ],
)
def test_what_a_peer_cannot_represent_is_refused(tmp_path: Path, format: str, sae: SAE, reason: str) -> None:
    with pytest.raises(InteropError, match=f"cannot be exported as {format}: .*{reason}"):
        pipeline.export(sae, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the check with the peers' own packages --------------------------------------------------------------------------


@pytest.mark.parametrize("side", sorted((SCRIPTS / "peers").glob("*.py")), ids=lambda path: path.name)
def test_the_peers_sides_use_none_of_our_code(side: Path) -> None:
    """Otherwise they would need our environment and compare our code with itself."""
    tree = ast.parse(side.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"sae", "store", "browser"}


def check_peers(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPTS / "check_peers.py", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=SCRIPTS.parent,
    )


def fake_environment(directory: Path, package: str) -> None:
    """An environment that check_peers takes as complete: this Python, in which no peer is installed."""
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "python").symlink_to(sys.executable)
    (directory / "installed").write_text(f"torch safetensors {package}")


@pytest.mark.slow
def test_the_check_fails_when_a_peer_cannot_run(tmp_path: Path) -> None:
    fake_environment(tmp_path / "sparsify", "eai-sparsify")
    done = check_peers(tmp_path, "--peer", "sparsify")
    assert done.returncode == 1
    assert "its side failed: ModuleNotFoundError" in done.stdout
    assert "agrees" not in (tmp_path / "table.md").read_text()
