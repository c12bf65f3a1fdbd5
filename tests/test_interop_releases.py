"""Published collections, rebuilt with random weights, compute what their formula says in float64."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import (
    D_IN,
    K,
    Tensors,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    qwen_scope,
    weights,
)
from safetensors.torch import load_file, save_file
from test_interop_read import X, close, largest

from sae.interop import hub, registry
from sae.interop.files import InteropError


@pytest.fixture
def w() -> Tensors:
    return weights()


@pytest.fixture
def w64(w: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in w.items()}


def jumprelu(w64: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Gemma Scope's equations: no pre-bias."""
    pre = X.double() @ w64["W_enc"] + w64["b_enc"]
    acts = pre.relu() * (pre > w64["threshold"])
    return acts, acts @ w64["W_dec"] + w64["b_dec"]


# --- Gemma Scope -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "model", "hook"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "google/gemma-2-2b", "blocks.12.hook_resid_post"),
        (
            "models--google--gemma-scope-9b-it-res/snapshots/0a1b/layer_9/width_16k/average_l0_88",
            "google/gemma-2-9b-it",
            "blocks.9.hook_resid_post",
        ),
        ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_82", "google/gemma-2-2b", "blocks.3.hook_mlp_out"),
        ("gemma-scope-27b-pt-att/layer_0/width_16k/average_l0_8", "google/gemma-2-27b", "blocks.0.attn.hook_z"),
        ("downloaded", None, None),
    ],
)
def test_gemma_scope(
    tmp_path: Path, w: Tensors, w64: Tensors, inside: str, model: str | None, hook: str | None
) -> None:
    path = gemma_scope(tmp_path / inside, w)
    for place in (path, path / "params.npz"):
        sae = registry.read(place)
        close(sae, *jumprelu(w64))
        assert sae.config["imported"]["format"] == "gemma-scope"
        assert sae.config["hook_point"] == hook
        assert sae.config["model"] == ({} if model is None else {"id": model})


def test_gemma_scope_of_embeddings_reads_scaled_ones(tmp_path: Path, w: Tensors, w64: Tensors) -> None:
    """Trained on rows of the embedding matrix; hook_embed is √d_model times that."""
    sae = registry.read(gemma_scope(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", w))
    scale = D_IN**0.5
    acts, x_hat = jumprelu(w64)
    close(sae, acts, scale * x_hat, X * scale)
    assert sae.config["hook_point"] == "hook_embed"


def test_a_transcoder_of_gemma_scope_is_refused(tmp_path: Path, w: Tensors) -> None:
    with pytest.raises(InteropError, match="a transcoder, by its path"):
        registry.read(gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_5", w))


def test_an_npz_with_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "witness",))

    np.savez(tmp_path / "params.npz", W_enc=np.array([Hostile()], dtype=object))
    with pytest.raises(InteropError, match=r"params\.npz is not a complete \.npz file of numbers"):
        registry.read(tmp_path)
    assert not (tmp_path / "witness").exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("source", "hook"),
    [
        ("model.layers.17.output", "blocks.17.hook_resid_post"),
        ("model.language_model.layers.4.output", "blocks.4.hook_resid_post"),
        ("model.layers.17.self_attn.o_proj.input", "blocks.17.attn.hook_z"),
        ("model.layers.17.post_feedforward_layernorm.output", "blocks.17.hook_mlp_out"),
    ],
)
def test_gemma_scope_2(tmp_path: Path, w: Tensors, w64: Tensors, source: str, hook: str) -> None:
    sae = registry.read(gemma_scope_2(tmp_path, w, hf_hook_point_in=source, hf_hook_point_out=source))
    close(sae, *jumprelu(w64))
    assert sae.config["hook_point"] == hook
    assert sae.config["model"] == {"id": "google/gemma-3-4b-pt"}
    assert sae.config["imported"]["format"] == "gemma-scope-2"


def test_gemma_scope_2_without_a_configuration(tmp_path: Path, w: Tensors) -> None:
    path = gemma_scope_2(tmp_path / "gemma-scope-2-1b-it" / "resid_post_all" / "layer_10_width_262k_l0_small", w)
    (path / "config.json").unlink()
    sae = registry.read(path)
    assert sae.config["hook_point"] == "blocks.10.hook_resid_post"
    assert sae.config["model"] == {"id": "google/gemma-3-1b-it"}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"type": "transcoder"}, "it is a transcoder"),
        ({"type": "crosscoder"}, "it is a crosscoder"),
        ({"affine_connection": True}, "transcoder"),
        ({"hf_hook_point_out": "model.layers.17.post_feedforward_layernorm.output"}, "predicts model.layers.17.post"),
        ({"architecture": "topk"}, "only jump_relu"),
        ({"width": 7}, "width is 7"),
    ],
)
def test_gemma_scope_2_is_refused_for_what_ours_cannot_do(
    tmp_path: Path, w: Tensors, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InteropError, match=reason):
        registry.read(gemma_scope_2(tmp_path, w, **config))


# --- Llama Scope -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_llama_scope(tmp_path: Path, w: Tensors, w64: Tensors, weighted: bool) -> None:
    """Its owners' loader: biases divided by the input scale, unit decoder rows, then one threshold."""
    sae = registry.read(llama_scope(tmp_path, w, norm=7.0, threshold=0.4, sparsity_include_decoder_norm=weighted))
    scale = D_IN**0.5 / 7.0
    norms = w64["W_dec"].norm(dim=-1) if weighted else 1.0
    h = (X.double() @ w64["W_enc"] + w64["b_enc"] / scale) * norms
    acts = h * (h > 0.4)
    x_hat = (acts / norms) @ w64["W_dec"] + w64["b_dec"] / scale
    close(sae, acts, x_hat)
    assert sae.config["hook_point"] == "blocks.19.hook_resid_post"
    assert sae.config["model"] == {"id": "meta-llama/Llama-3.1-8B"}
    assert sae.config["imported"]["format"] == "llama-scope"


def test_llama_scope_with_unit_rows_is_what_sae_lens_computes(tmp_path: Path, w: Tensors, w64: Tensors) -> None:
    """SAELens scales the input instead: pre-activations and threshold times the scale, the same features and x̂."""
    w["W_dec"] = torch.nn.functional.normalize(w["W_dec"], dim=-1)
    scale = D_IN**0.5 / 7.0
    pre = scale * X.double() @ w64["W_enc"] + w64["b_enc"]
    theirs = pre.relu() * (pre > 0.4 * scale)
    x_hat = (theirs @ w["W_dec"].double() + w64["b_dec"]) / scale
    close(registry.read(llama_scope(tmp_path, w)), theirs / scale, x_hat)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hook_point_out": "blocks.19.hook_mlp_out"}, "transcoder"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm.in must be a positive number"),
        ({"dataset_average_activation_norm": {"in": 0}}, "must be a positive number"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold must be a number"),
        ({"norm_activation": "token-wise"}, "token-wise"),
        ({"use_glu_encoder": True}, "gated by a second"),
        ({"act_fn": "batchtopk"}, "batchtopk"),
        ({"d_sae": 7}, "d_sae is 7"),
    ],
)
def test_llama_scope_is_refused_for_what_ours_cannot_do(
    tmp_path: Path, w: Tensors, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InteropError, match=reason):
        registry.read(llama_scope(tmp_path, w, **config))


def test_llamascopium_with_the_tensor_names_of_older_releases(tmp_path: Path, w: Tensors) -> None:
    """As Llama-Scope-R1-Distill: linear layers and log_jumprelu_threshold."""
    path = llamascopium(tmp_path, w, "jumprelu", norm=7.0)
    new = registry.read(path)
    held = load_file(path / "sae_weights.safetensors")
    old = {"encoder.weight": held["W_E"].T, "encoder.bias": held["b_E"], "decoder.weight": held["W_D"].T}
    old |= {"decoder.bias": held["b_D"], "log_jumprelu_threshold": held["activation_function.log_jumprelu_threshold"]}
    old |= {name: tensor for name, tensor in held.items() if name.startswith("dataset_average")}
    save_file({name: tensor.contiguous() for name, tensor in old.items()}, str(path / "sae_weights.safetensors"))
    assert torch.equal(registry.read(path)(X), new(X))


# --- Goodfire, Qwen Scope --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "hook"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "meta-llama/Llama-3.1-8B-Instruct", "blocks.19.hook_resid_post"),
        ("Llama-3.3-70B-Instruct-SAE-l50.pt", "meta-llama/Llama-3.3-70B-Instruct", "blocks.50.hook_resid_post"),
        ("weights.pt", None, None),
    ],
)
def test_goodfire(tmp_path: Path, w: Tensors, w64: Tensors, name: str, model: str | None, hook: str | None) -> None:
    path = goodfire(tmp_path, w, name)
    acts = (X.double() @ w64["W_enc"] + w64["b_enc"]).relu()
    for place in (path, path.parent):
        sae = registry.read(place)
        close(sae, acts, acts @ w64["W_dec"] + w64["b_dec"])
        assert sae.config["imported"]["format"] == "goodfire"
        assert sae.config["hook_point"] == hook
        assert sae.config["model"] == ({} if model is None else {"id": model})


def test_qwen_scope(tmp_path: Path, w: Tensors, w64: Tensors) -> None:
    path = qwen_scope(tmp_path, w)
    pre = X.double() @ w64["W_enc"] + w64["b_enc"]
    acts = pre.relu() * largest(pre, K)
    sae = registry.read(path)
    close(sae, acts, acts @ w64["W_dec"] + w64["b_dec"])
    assert sae.k == K
    assert sae.config["hook_point"] == "blocks.5.hook_resid_post"
    assert sae.config["model"] == {"id": "Qwen/Qwen3-1.7B-Base"}
    assert sae.config["imported"]["format"] == "qwen-scope"


def test_qwen_scope_outside_its_repository_lacks_k(tmp_path: Path, w: Tensors) -> None:
    with pytest.raises(InteropError, match="its k is not in the file"):
        registry.read(qwen_scope(tmp_path, w, "somewhere"))


def test_the_files_that_a_published_collection_needs_are_fetched() -> None:
    listed = [
        "L19/hyperparams.json",
        "L19/checkpoints/final.safetensors",
        "L19/checkpoints/README",
        "L2/hyperparams.json",
    ]
    assert hub.files_of(listed, "L19") == listed[:3]
    assert hub.files_of(["a/params.npz", "a/README.md", "b/params.npz"], "a") == ["a/params.npz", "a/README.md"]
    assert hub.files_of(["x.pth", "README.md"], "x.pth") == ["x.pth"]
    assert hub.files_of(["layer0.sae.pt", "layer1.sae.pt"], "layer0.sae.pt") == ["layer0.sae.pt"]
