"""Dictionaries of other tools compute what the peer's formula says, in float64, from the tensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import (
    D_IN,
    D_SAE,
    PEERS,
    K,
    dictionary_learning,
    llamascopium,
    nanda,
    openai,
    saelens,
    sparsify,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.dictionary.autoencoder import SAE
from sae.interop import registry
from sae.interop.files import InteropError
from sae.interop.hooks import hook_point, layer_of, short_hook_point

X = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(9)) * 2


def close(sae: SAE, acts: torch.Tensor, x_hat: torch.Tensor, x: torch.Tensor = X) -> None:
    assert (acts > 0).any()
    assert (sae.encode(x) - acts).abs().max() <= 1e-5 * max(1, acts.abs().max())
    assert (sae.reconstruct(x) - x_hat).abs().max() <= 1e-5 * max(1, x_hat.abs().max())


def largest(pre: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k largest entries of each row."""
    return pre >= pre.topk(k, dim=-1).values[:, -1:]


def layer_normed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows that SAELens and OpenAI's code encode, their means and deviations (with d − 1), in float64."""
    x = x.double()
    mean = x.mean(-1, keepdim=True)
    std = ((x - mean).pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
    return (x - mean) / (std + 1e-5), mean, std


@pytest.fixture
def w() -> dict[str, torch.Tensor]:
    return weights()


@pytest.fixture
def w64(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in w.items()}


# --- SAELens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("pre_bias", [True, False])
def test_sae_lens(tmp_path: Path, w: dict, w64: dict, architecture: str, pre_bias: bool) -> None:
    sae = registry.read(saelens(tmp_path, w, architecture, apply_b_dec_to_input=pre_bias))
    pre = (X.double() - w64["b_dec"] * pre_bias) @ w64["W_enc"] + w64["b_enc"]
    acts = {
        "standard": pre.relu(),
        "topk": pre.relu() * largest(pre, K),
        "jumprelu": pre.relu() * (pre > w64["threshold"]),
        "gated": (pre > 0) * ((pre - w64["b_enc"]) * w64["r_mag"].exp() + w64["b_mag"]).relu(),
    }[architecture]
    close(sae, acts, acts @ w64["W_dec"] + w64["b_dec"])
    assert sae.config["hook_point"] == "blocks.0.mlp.hook_post"
    assert sae.config["model"] == {"id": "gelu-1l"}
    assert sae.config["recipe"] == f"sae-lens:{architecture}"
    assert sae.config["imported"]["config"]["metadata"]["sae_lens_version"] == "6.54.12"


def test_sae_lens_tensors_are_taken_unchanged(tmp_path: Path, w: dict) -> None:
    sae = registry.read(saelens(tmp_path, w))
    assert all(torch.equal(tensor, w[name]) for name, tensor in sae.tensors().items())


def test_sae_lens_decoder_norms_are_folded_if_they_choose_the_features(tmp_path: Path, w: dict, w64: dict) -> None:
    sae = registry.read(saelens(tmp_path, w, "topk", rescale_acts_by_decoder_norm=True))
    norms = w64["W_dec"].norm(dim=-1)
    pre = ((X.double() - w64["b_dec"]) @ w64["W_enc"] + w64["b_enc"]) * norms
    acts = pre.relu() * largest(pre, K)
    close(sae, acts, (acts / norms) @ w64["W_dec"] + w64["b_dec"])
    assert "decoder norms folded" in sae.config["imported"]["notes"][0]


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_sae_lens_input_scale_is_folded_if_it_is_in_the_file(
    tmp_path: Path, w: dict, w64: dict, architecture: str
) -> None:
    path = saelens(tmp_path, w, architecture, normalize_activations="expected_average_only_in")
    with pytest.raises(InteropError, match="scaled by a constant that is not in the file"):
        registry.read(path)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    pre = (0.25 * X.double() - w64["b_dec"]) @ w64["W_enc"] + w64["b_enc"]
    acts = pre.relu() * (pre > (w64["threshold"] if architecture == "jumprelu" else 0))
    close(registry.read(path), acts, (acts @ w64["W_dec"] + w64["b_dec"]) / 0.25)


def test_sae_lens_before_6_has_all_settings_at_the_top_level(tmp_path: Path, w: dict) -> None:
    path = saelens(tmp_path, w)
    config = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre",
        "normalize_activations": False,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
    }
    (path / "cfg.json").write_text(json.dumps(config))
    sae = registry.read(path)
    assert (sae.activation, sae.k, sae.pre_bias) == ("topk", K, True)
    assert sae.config["hook_point"] == "blocks.8.hook_resid_pre"
    assert sae.config["model"] == {"id": "gpt2-small"}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"normalize_activations": "per_batch"}, "normalises activations in a way that is not known"),
        ({"normalize_activations": "covariance_whitening"}, "their statistics"),
        ({"reshape_activations": "hook_z"}, "reshapes activations of blocks.0.mlp.hook_post"),
        ({"metadata": {"hook_head_index": 3}}, "single attention head"),
        ({"hook_point_head_index": 0}, "single attention head"),
        ({"architecture": "abstopk", "k": 3}, "can be negative"),
        ({"architecture": "jumprelu_skip_transcoder"}, "transcoder"),
        ({"activation_fn_kwargs": {"k": 3, "signed": True}}, "signed = True"),
        ({"rescale_acts_by_decoder_norm": True}, "belongs to topk and batchtopk"),
        ({"metadata": {"hook_name_out": "blocks.0.hook_mlp_out"}}, "transcoder"),
        ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
    ],
)
def test_sae_lens_is_refused_for_what_ours_cannot_do(
    tmp_path: Path, w: dict, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InteropError, match=reason):
        registry.read(saelens(tmp_path, w, **config))


# --- dictionary_learning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"])
def test_dictionary_learning(tmp_path: Path, w: dict, w64: dict, kind: str) -> None:
    sae = registry.read(dictionary_learning(tmp_path, w, kind))
    pre = (X.double() - w64["b_dec"] * (kind != "AutoEncoderNew")) @ w64["W_enc"] + w64["b_enc"]
    acts = pre.relu()
    if kind == "AutoEncoderTopK":
        acts = acts * largest(pre, K)
    if kind == "BatchTopKSAE":
        acts = acts * (acts > 0.5)
    close(sae, acts, acts @ w64["W_dec"] + w64["b_dec"])
    assert sae.config["hook_point"] == "blocks.3.hook_resid_post"
    assert sae.config["model"] == {"id": "EleutherAI/pythia-70m-deduped"}


def test_dictionary_learning_with_a_threshold_never_set_is_refused(tmp_path: Path, w: dict) -> None:
    path = dictionary_learning(tmp_path, w, "BatchTopKSAE")
    state = torch.load(path / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, path / "ae.pt")
    with pytest.raises(InteropError, match="threshold was never set"):
        registry.read(path)


# --- sparsify --------------------------------------------------------------------------------------------------------


def test_sparsify(tmp_path: Path, w: dict, w64: dict) -> None:
    sae = registry.read(sparsify(tmp_path / "h.5.mlp.act", w))
    pre = (X.double() - w64["b_dec"]) @ w64["W_enc"] + w64["b_enc"]
    acts = pre.relu() * largest(pre, K)
    close(sae, acts, acts @ w64["W_dec"] + w64["b_dec"])
    assert sae.config["hook_point"] == "blocks.5.mlp.hook_post"
    assert sae.config["model"] == {}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "W_skip"),
        ({"signed": True}, "negative"),
        ({"activation": "groupmax"}, "groupmax"),
        ({"num_latents": 21}, "num_latents is 21"),
    ],
)
def test_sparsify_is_refused_for_what_ours_cannot_do(
    tmp_path: Path, w: dict, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InteropError, match=reason):
        registry.read(sparsify(tmp_path / "layers.3", w, **config))


# --- Llamascopium ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("norm", [None, 7.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_llamascopium(tmp_path: Path, w: dict, w64: dict, act_fn: str, norm: float | None, weighted: bool) -> None:
    sae = registry.read(llamascopium(tmp_path, w, act_fn, norm=norm, sparsity_include_decoder_norm=weighted))
    scale = 1.0 if norm is None else D_IN**0.5 / norm
    norms = w64["W_dec"].norm(dim=-1) if weighted else torch.ones(D_SAE, dtype=torch.float64)
    pre = (scale * X.double()) @ w64["W_enc"] + w64["b_enc"]
    active = {"relu": pre > 0, "jumprelu": pre * norms > w64["threshold"], "topk": largest(pre * norms, K) & (pre > 0)}[
        act_fn
    ]
    acts = pre * active
    x_hat = (acts @ w64["W_dec"] + w64["b_dec"]) / scale
    close(sae, acts / scale * (norms if act_fn == "topk" else 1), x_hat)
    assert sae.config["hook_point"] == "blocks.5.hook_mlp_out"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"act_fn": "batchtopk"}, "rest of the batch"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"hook_point_out": "blocks.6.hook_mlp_out"}, "transcoder"),
        ({"norm_activation": "batch-wise"}, "batch-wise"),
        ({"norm_activation": "dataset-wise"}, "norm is not in the file"),
        ({"sae_type": "crosscoder"}, "crosscoder"),
        ({"d_model": 7}, "d_model is 7"),
    ],
)
def test_llamascopium_is_refused_for_what_ours_cannot_do(
    tmp_path: Path, w: dict, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InteropError, match=reason):
        registry.read(llamascopium(tmp_path, w, **config))


def test_llamascopium_from_its_training_checkpoint(tmp_path: Path, w: dict) -> None:
    path = llamascopium(tmp_path, w)
    state = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    (path / "sae_weights.safetensors").unlink()
    (path / "checkpoints").mkdir()
    torch.save({"sae": state, "version": "2.0.0b34"}, path / "checkpoints" / "final.pt")
    assert torch.equal(registry.read(path).W_enc, w["W_enc"])


# --- one-file dictionaries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nanda", "openai"])
def test_relu_with_a_tied_pre_bias_in_one_file(tmp_path: Path, w: dict, w64: dict, kind: str) -> None:
    sae = registry.read(PEERS[kind](tmp_path, w))
    acts = ((X.double() - w64["b_dec"]) @ w64["W_enc"] + w64["b_enc"]).relu()
    close(sae, acts, acts @ w64["W_dec"] + w64["b_dec"])
    assert sae.config["hook_point"] == ("blocks.0.mlp.hook_post" if kind == "nanda" else None)
    assert sae.config["model"] == ({"id": "gelu-1l"} if kind == "nanda" else {})


def test_nanda_by_directory_and_by_file(tmp_path: Path, w: dict) -> None:
    one = nanda(tmp_path, w, act="pre", layer=0)
    assert registry.read(tmp_path).config["hook_point"] == "blocks.0.mlp.hook_pre"
    for name in ("47.pt", "47_cfg.json"):
        (tmp_path / name).write_bytes((tmp_path / name.replace("47", "25")).read_bytes())
    with pytest.raises(InteropError, match=r"several dictionaries \(25.pt, 47.pt\); give the path of one file"):
        registry.read(tmp_path)
    assert torch.equal(registry.read(one).W_enc, w["W_enc"])


def test_openais_topk_normalises_each_row(tmp_path: Path, w: dict, w64: dict) -> None:
    sae = registry.read(openai(tmp_path, w, "TopK"))
    rows, mean, std = layer_normed(X)
    pre = (rows - w64["b_dec"]) @ w64["W_enc"] + w64["b_enc"]
    acts = pre.relu() * largest(pre, K)
    close(sae, acts, (acts @ w64["W_dec"] + w64["b_dec"]) * std + mean)


# --- all peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_is_recognised_by_its_files_and_by_no_others(tmp_path: Path, w: dict, peer: str) -> None:
    assert set(PEERS) == set(registry.PEERS)
    path = PEERS[peer](tmp_path, w)
    assert peer == registry.identify(path).NAME
    assert [name for name, known in registry.PEERS.items() if known.detect(path)] == [peer]


UNCHANGED = sorted(PEERS.keys() - {"llama-scope"})  # which divides its biases by a scale


@settings(max_examples=15, deadline=None)
@given(
    peer=st.sampled_from(UNCHANGED),
    d_in=st.integers(1, 9),
    d_sae=st.integers(K, 33),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_tensors_of_any_shape_and_scale_are_taken_unchanged(
    tmp_path_factory: pytest.TempPathFactory, peer: str, d_in: int, d_sae: int, scale: float, seed: int
) -> None:
    made = {name: tensor * scale for name, tensor in weights(seed, d_in, d_sae).items()}
    sae = registry.read(PEERS[peer](tmp_path_factory.mktemp("peer"), made))
    assert (sae.d_in, sae.d_sae) == (d_in, d_sae)
    for name, tensor in sae.tensors().items():
        assert torch.equal(tensor, made[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, w: dict, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in w.items()}
    sae = registry.read(saelens(tmp_path, stored))
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in sae.tensors().items())


# --- hook points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("blocks.7.hook_resid_pre", "blocks.7.hook_resid_pre"),
        ("blocks.0.attn.hook_result", "blocks.0.attn.hook_result"),
        ("hook_embed", "hook_embed"),
        ("ln_final.hook_normalized", "ln_final.hook_normalized"),
        ("layers.24", "blocks.24.hook_resid_post"),
        ("model.layers.24.mlp", "blocks.24.hook_mlp_out"),
        ("gpt_neox.layers.3", "blocks.3.hook_resid_post"),
        ("transformer.h.11.mlp.act", "blocks.11.mlp.hook_post"),
        ("model.layers.2.self_attn", "blocks.2.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
        ("resid_post_layer_3", "blocks.3.hook_resid_post"),
        ("mlp_out_layer0", "blocks.0.hook_mlp_out"),
        ("somewhere", None),
        ("layers.x", None),
        ("", None),
        (None, None),
    ],
)
def test_hook_points_get_their_transformer_lens_name(place: str | None, expected: str | None) -> None:
    assert hook_point(place) == expected


def test_short_names_need_a_layer() -> None:
    assert short_hook_point("post", 0) == "blocks.0.mlp.hook_post"
    assert short_hook_point("resid_mid", 4) == "blocks.4.hook_resid_mid"
    assert short_hook_point("post", None) is None
    assert short_hook_point("layers.2", None) == "blocks.2.hook_resid_post"
    assert layer_of("blocks.12.hook_mlp_out") == 12
    assert layer_of("hook_embed") is None
