"""Settings of other tools that change what a dictionary computes: each is exact by its formula, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import (
    D_IN,
    D_SAE,
    K,
    Tensors,
    dictionary_learning,
    gemma_scope_2,
    llama_scope,
    llamascopium,
    nanda,
    openai,
    saelens,
    sparsify,
    weights,
)
from safetensors.torch import load_file, save_file
from test_interop_read import X, close, largest, layer_normed

from sae import pipeline
from sae.cli import main
from sae.dictionary.autoencoder import SAE
from sae.interop import registry
from sae.interop.files import InteropError

HOOK = "blocks.6.hook_resid_pre"
CENTRED = {
    "model_from_pretrained_kwargs": {"center_writing_weights": True},
    "model_name": "gpt2-small",
    "hook_name": HOOK,
}


@pytest.fixture
def w() -> Tensors:
    return weights()


@pytest.fixture
def w64(w: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in w.items()}


def add_tensors(path: Path, **more: torch.Tensor) -> Path:
    file = path / "sae_weights.safetensors"
    save_file(load_file(file) | more, str(file))
    return path


def activations(w64: Tensors, rows: torch.Tensor, architecture: str, pre_bias: bool) -> torch.Tensor:
    """SAELens' encoders in float64, on rows that are processed already."""
    pre = (rows - w64["b_dec"] * pre_bias) @ w64["W_enc"] + w64["b_enc"]
    return {
        "standard": pre.relu(),
        "topk": pre.relu() * largest(pre, K),
        "jumprelu": pre.relu() * (pre > w64["threshold"]),
        "gated": (pre > 0) * ((pre - w64["b_enc"]) * w64["r_mag"].exp() + w64["b_mag"]).relu(),
    }[architecture]


# --- centred writing weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_a_dictionary_of_centred_rows_reads_the_models_own(
    tmp_path: Path, w: Tensors, w64: Tensors, architecture: str, pre_bias: bool
) -> None:
    x = X + 2  # a mean that would show
    sae = registry.read(saelens(tmp_path, w, architecture, apply_b_dec_to_input=pre_bias, metadata=CENTRED))
    mean = x.double().mean(-1, keepdim=True)
    acts = activations(w64, x.double() - mean, architecture, pre_bias)
    close(sae, acts, acts @ w64["W_dec"] + w64["b_dec"] + mean, x)
    assert sae.row_norm == "mean"
    assert "center_writing_weights" in sae.config["imported"]["notes"][-1]


@pytest.mark.parametrize(
    ("model", "hook", "centred"),
    [
        ("EleutherAI/pythia-70m-deduped", "blocks.3.hook_mlp_out", True),
        ("gpt2", "blocks.3.hook_attn_out", True),
        ("gpt2", "blocks.3.mlp.hook_post", False),  # not written to the residual stream
        ("gpt2", "blocks.3.attn.hook_z", False),
        ("google/gemma-2-2b", "blocks.3.hook_resid_post", False),  # RMSNorm: TransformerLens does not centre
        ("meta-llama/Llama-3.1-8B", "blocks.3.hook_resid_post", False),
        ("microsoft/Phi-3-mini-4k-instruct", "blocks.3.hook_resid_post", False),
        ("microsoft/phi-2", "blocks.3.hook_resid_post", True),
    ],
)
def test_centring_applies_where_transformer_lens_centres(
    tmp_path: Path, w: Tensors, model: str, hook: str, centred: bool
) -> None:
    sae = registry.read(saelens(tmp_path, w, metadata=CENTRED | {"model_name": model, "hook_name": hook}))
    assert (sae.row_norm == "mean") is centred
    assert torch.equal(sae.W_enc, w["W_enc"]) is not centred


def test_centring_of_an_unknown_model_is_refused_unless_left_out(tmp_path: Path, w: Tensors) -> None:
    path = saelens(tmp_path / "peer", w, metadata=CENTRED | {"model_name": "owner/new-model"})
    with pytest.raises(InteropError, match="whether owner/new-model has one .* --ignore center_writing_weights"):
        registry.read(path)
    out = tmp_path / "out"
    assert main(["import", str(path), "--out", str(out), "--ignore", "center_writing_weights"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["imported"]["ignored"] == ["center_writing_weights"]
    assert config["imported"]["config"]["metadata"]["model_from_pretrained_kwargs"]["center_writing_weights"] is True


def test_a_release_whose_file_lacks_the_setting_is_recognised_by_its_shape(tmp_path: Path) -> None:
    """As gpt2-small-res-jb: before SAELens 3.20 models were always processed, and files do not say so."""
    real = weights(d_in=768, d_sae=8)
    path = saelens(tmp_path / "old", real)
    old = {
        "architecture": "standard",
        "d_in": 768,
        "d_sae": 8,
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre",
        "hook_point_layer": 8,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "context_size": 128,
        "total_training_tokens": 300_000_000,
        "feature_sampling_method": None,
        "expansion_factor": 32,
        "l1_coefficient": 8e-5,
        "lr_scheduler_name": "constantwithwarmup",
        "use_ghost_grads": True,
        "run_name": "24576-L1-8e-05-LR-0.0004",
    }
    (path / "cfg.json").write_text(json.dumps(old))
    sae = registry.read(path)
    assert sae.row_norm == "mean"
    assert "SAELens before 3.20" in sae.config["imported"]["notes"][0]
    for change in (
        {"sae_lens_training_version": "3.22.1"},  # models were no longer processed
        {"d_in": None, "model_name": "gemma-2b"},
        {"hook_point": "blocks.8.mlp.hook_post"},
        {"model_from_pretrained_kwargs": {}},
    ):
        (path / "cfg.json").write_text(json.dumps(old | change))
        assert registry.read(path).row_norm is None, change
    (path / "cfg.json").write_text(json.dumps(old))
    assert registry.read(path, ignore=["center_writing_weights"]).row_norm is None
    (path / "cfg.json").write_text(json.dumps(old | {"hook_point": "blocks.8.attn.hook_z"}))
    with pytest.raises(InteropError, match="fold_value_biases"):
        registry.read(path)
    assert registry.read(path, ignore=["fold_value_biases"]).row_norm is None


@pytest.mark.parametrize(
    ("processing", "hook", "refused"),
    [
        ({"fold_ln": True}, "blocks.1.ln1.hook_normalized", True),
        ({"fold_ln": True, "center_unembed": True, "dtype": "bfloat16"}, HOOK, False),
        ({"fold_value_biases": True}, "blocks.1.attn.hook_v", True),
        ({"refactor_factored_attn_matrices": True}, "blocks.1.attn.hook_q", True),
        ({"checkpoint_value": 1000}, HOOK, True),  # another model
    ],
)
def test_other_processing_is_refused_where_it_changes_activations(
    tmp_path: Path, w: Tensors, processing: dict[str, Any], hook: str, refused: bool
) -> None:
    told = {"model_from_pretrained_kwargs": processing, "model_name": "gpt2", "hook_name": hook}
    path = saelens(tmp_path, w, metadata=told)
    if refused:
        with pytest.raises(InteropError, match=next(iter(processing))):
            registry.read(path)
    else:
        assert torch.equal(registry.read(path).W_enc, w["W_enc"])


def test_nandas_code_opened_models_with_processing(tmp_path: Path, w: Tensors, w64: Tensors) -> None:
    sae = registry.read(nanda(tmp_path / "a", w, act_name="blocks.0.hook_mlp_out"))
    mean = X.double().mean(-1, keepdim=True)
    acts = activations(w64, X.double() - mean, "standard", pre_bias=True)
    close(sae, acts, acts @ w64["W_dec"] + w64["b_dec"] + mean)
    with pytest.raises(InteropError, match="fold_value_biases"):
        registry.read(nanda(tmp_path / "b", w, act_name="blocks.0.attn.hook_z", model_name="gpt2-small"))
    with pytest.raises(InteropError, match="remove_rare_dir"):
        registry.read(nanda(tmp_path / "c", w, remove_rare_dir=True))


# --- scales and normalisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
@pytest.mark.parametrize("said", [True, None])
def test_the_factors_of_a_fine_tuned_decoder_are_folded(
    tmp_path: Path, w: Tensors, w64: Tensors, name: str, said: bool | None
) -> None:
    factor = torch.rand(D_SAE, generator=torch.Generator().manual_seed(2)) + 0.5
    path = add_tensors(saelens(tmp_path, w, finetuning_scaling_factor=said), **{name: factor})
    acts = activations(w64, X.double(), "standard", pre_bias=True)
    close(registry.read(path), acts, (acts * factor.double()) @ w64["W_dec"] + w64["b_dec"])
    add_tensors(path, **{name: torch.ones(D_SAE)})  # says nothing
    assert torch.equal(registry.read(path).W_dec, w["W_dec"])


@pytest.mark.parametrize(
    ("tensors", "said", "reason"),
    [
        ({"scaling_factor": torch.full((D_SAE,), 2.0)}, False, "says that none is used"),
        ({"scaling_factor": torch.full((3,), 2.0)}, True, "must be 20 finite numbers"),
        ({"scaling_factor": torch.full((D_SAE,), torch.nan)}, True, "must be 20 finite numbers"),
        ({}, True, "the factors are not in the file"),
    ],
)
def test_factors_that_contradict_the_settings_are_refused(
    tmp_path: Path, w: Tensors, tensors: Tensors, said: bool, reason: str
) -> None:
    with pytest.raises(InteropError, match=reason):
        registry.read(add_tensors(saelens(tmp_path, w, finetuning_scaling_factor=said), **tensors))


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_rows_normalised_one_by_one(
    tmp_path: Path, w: Tensors, w64: Tensors, architecture: str, normalize: str
) -> None:
    sae = registry.read(saelens(tmp_path / "peer", w, architecture, normalize_activations=normalize))
    rows, shift, scale = layer_normed(X)
    if normalize == "constant_norm_rescale":
        scale = X.double().norm(dim=-1, keepdim=True) / D_IN**0.5
        rows, shift = X.double() / scale, torch.zeros(1)
    acts = activations(w64, rows, architecture, pre_bias=True)
    close(sae, acts, (acts @ w64["W_dec"] + w64["b_dec"]) * scale + shift)
    sae.config["hook_point"] = HOOK
    out = pipeline.export(sae, "sae-lens", tmp_path / "out")
    assert json.loads((out / "cfg.json").read_text())["normalize_activations"] == normalize
    assert torch.equal(registry.read(out)(X), sae(X))
    for other in ("sparsify", "dictionary-learning"):
        with pytest.raises(InteropError, match="cannot be exported as"):
            pipeline.export(sae, other, tmp_path / other)


def test_tokens_normalised_one_by_one_by_llamascopium(tmp_path: Path, w: Tensors, w64: Tensors) -> None:
    sae = registry.read(llamascopium(tmp_path, w, norm_activation="token-wise"))
    scale = X.double().norm(dim=-1, keepdim=True) / D_IN**0.5
    acts = (X.double() / scale @ w64["W_enc"] + w64["b_enc"]).relu()
    close(sae, acts, (acts @ w64["W_dec"] + w64["b_dec"]) * scale)


@pytest.mark.parametrize("architecture", ["standard", "gated"])
@pytest.mark.parametrize("pre_bias", [True, False])
def test_whitening_is_folded(tmp_path: Path, w: Tensors, w64: Tensors, architecture: str, pre_bias: bool) -> None:
    g = torch.Generator().manual_seed(4)
    mean, matrix = torch.randn(D_IN, generator=g), torch.eye(D_IN) + 0.3 * torch.randn(D_IN, D_IN, generator=g)
    path = saelens(
        tmp_path, w, architecture, normalize_activations="covariance_whitening", apply_b_dec_to_input=pre_bias
    )
    inverse = torch.linalg.inv(matrix.double())
    save_file(
        {"mean": mean, "matrix": matrix, "inverse_matrix": inverse.float().contiguous()},
        str(path / "activation_whitening.safetensors"),
    )
    rows = (X.double() - mean.double()) @ matrix.double()
    acts = activations(w64, rows, architecture, pre_bias)
    close(registry.read(path), acts, (acts @ w64["W_dec"] + w64["b_dec"]) @ inverse + mean.double())


def test_an_encoder_that_subtracts_the_decoders_bias_after_scaling(tmp_path: Path, w: Tensors, w64: Tensors) -> None:
    sae = registry.read(llamascopium(tmp_path, w, norm=7.0, apply_decoder_bias_to_pre_encoder=True))
    scale = D_IN**0.5 / 7.0
    acts = ((scale * X.double() - w64["b_dec"]) @ w64["W_enc"] + w64["b_enc"]).relu()
    close(sae, acts / scale, (acts @ w64["W_dec"] + w64["b_dec"]) / scale)


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [{"reshape_activations": "hook_z"}, {}])
def test_heads_joined_by_sae_lens_are_joined_alike_here(
    tmp_path: Path, w: Tensors, w64: Tensors, said: dict[str, Any]
) -> None:
    """Its "... n_heads d_head -> ... (n_heads d_head)" is the order of our rows; an export says it again."""
    hook = {"hook_name": "blocks.2.attn.hook_z"}
    sae = registry.read(saelens(tmp_path / "peer", w, metadata=hook, **said))
    heads = X.view(-1, 2, D_IN // 2)
    acts = activations(w64, heads.flatten(1).double(), "standard", pre_bias=True)
    close(sae, acts, acts @ w64["W_dec"] + w64["b_dec"])
    out = pipeline.export(sae, "sae-lens", tmp_path / "out")
    assert json.loads((out / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    assert registry.read(out).config["hook_point"] == "blocks.2.attn.hook_z"


# --- unknown settings ------------------------------------------------------------------------------------------------

CHANGING = {"output_gain": 2.0}


def trainer(path: Path, w: Tensors, **more: Any) -> Path:
    return dictionary_learning(path, w, **more)


MAKERS: dict[str, Callable[..., Path]] = {
    "sae-lens": saelens,
    "dictionary-learning": trainer,
    "sparsify": lambda path, w, **more: sparsify(path / "layers.3", w, **more),
    "llamascopium": llamascopium,
    "llama-scope": llama_scope,
    "gemma-scope-2": gemma_scope_2,
    "nanda": nanda,
}


@pytest.mark.parametrize("peer", MAKERS)
def test_an_unknown_setting_is_refused_by_name_unless_off_or_left_out(tmp_path: Path, w: Tensors, peer: str) -> None:
    make = MAKERS[peer]
    with pytest.raises(InteropError, match=r"output_gain = 2\.0.* --ignore NAME"):
        registry.read(make(tmp_path / "a", w, output_gain=2.0))
    for number, off in enumerate((None, False, "none", "", [], {})):
        registry.read(make(tmp_path / f"off-{number}", w, output_gain=off))
    path = make(tmp_path / "b", w, output_gain=2.0)
    sae = registry.read(path, ignore=["output_gain"])
    assert sae.config["imported"]["ignored"] == ["output_gain"]
    assert "output_gain" in json.dumps(sae.config["imported"]["config"])
    with pytest.raises(InteropError, match=r"--ignore outptu_gain: .* has no such setting; it has .*output_gain"):
        registry.read(tmp_path / "off-0" / path.relative_to(tmp_path / "b"), ignore=["outptu_gain"])


def test_without_a_configuration_there_is_nothing_to_leave_out(tmp_path: Path, w: Tensors) -> None:
    with pytest.raises(InteropError, match="--ignore x: .* it has none"):
        registry.read(openai(tmp_path, w), ignore=["x"])


def test_a_remark_in_sae_lens_metadata_is_no_setting(tmp_path: Path, w: Tensors) -> None:
    assert registry.read(saelens(tmp_path, w, metadata={"author": "somebody", "loss": 0.3})).d_sae == D_SAE


def test_what_only_the_training_used_is_harmless(tmp_path: Path, w: Tensors) -> None:
    """Version 1 wrote its whole training configuration; some of it deserves a remark."""
    told = {"lr": 1e-3, "l1_coefficient": 5, "noise_scale": 0.1, "normalize_sae_decoder": True, "wandb_project": "x"}
    told |= {"seqpos_slice": [1, None], "exclude_special_tokens": True, "decoder_heuristic_init": True, "lp_norm": 1.0}
    sae = registry.read(saelens(tmp_path, w, **told))
    notes = " ".join(sae.config["imported"]["notes"])
    assert all(word in notes for word in ("noise_scale", "seqpos_slice", "exclude_special_tokens"))


# --- dictionary_learning's older files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "trainer_class"),
    [
        ("AutoEncoder", "StandardTrainer"),
        ("AutoEncoder", None),
        ("AutoEncoderNew", None),
        ("AutoEncoderTopK", "TrainerTopK"),
        ("BatchTopKSAE", "BatchTopKTrainer"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_a_configuration_without_a_class(
    tmp_path: Path, w: Tensors, kind: str, trainer_class: str | None, nested: bool
) -> None:
    named = registry.read(dictionary_learning(tmp_path / "named", w, kind))
    path = dictionary_learning(tmp_path / "old", w, kind)
    told = {"k": K, "lm_name": "EleutherAI/pythia-70m-deduped", "layer": 3, "submodule_name": "resid_post_layer_3"}
    told |= {} if trainer_class is None else {"trainer_class": trainer_class}
    (path / "config.json").write_text(json.dumps({"trainer": told} if nested else told))
    found = registry.read(path)
    assert found.shape == named.shape
    assert torch.equal(found(X), named(X))
    assert found.config["hook_point"] == "blocks.3.hook_resid_post"
    assert found.config["imported"]["notes"] == [f"recognised as {kind} by its tensors"]


def test_a_class_that_its_tensors_leave_open_is_asked_for(tmp_path: Path, w: Tensors) -> None:
    path = dictionary_learning(tmp_path, w, "AutoEncoderTopK")
    (path / "config.json").write_text(json.dumps({"trainer": {"k": K}}))
    with pytest.raises(InteropError, match="fit AutoEncoderTopK and BatchTopKSAE"):
        registry.read(path)


@pytest.mark.parametrize(("io", "said"), [("in", None), ("in_and_out", "transcoder")])
def test_a_module_whose_input_was_read(tmp_path: Path, w: Tensors, io: str, said: str | None) -> None:
    path = dictionary_learning(tmp_path, w)
    config = json.loads((path / "config.json").read_text()) | {"buffer": {"io": io, "ctx_len": 128}}
    (path / "config.json").write_text(json.dumps(config))
    if said:
        with pytest.raises(InteropError, match=said):
            registry.read(path)
    else:
        sae: SAE = registry.read(path)
        assert sae.config["hook_point"] is None  # its name is that of the module's output
        assert "reads the input of" in sae.config["imported"]["notes"][0]
