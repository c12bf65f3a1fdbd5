"""Dictionaries in the peers' file layouts, made from the peers' documentation without our code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D_IN, D_SAE, K = 6, 20, 3
Tensors = dict[str, torch.Tensor]


def weights(seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> Tensors:
    """Random tensors by our names; decoder rows have any norm."""
    g = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(d_in, d_sae, generator=g),
        "b_enc": torch.randn(d_sae, generator=g),
        "W_dec": torch.randn(d_sae, d_in, generator=g),
        "b_dec": torch.randn(d_in, generator=g),
        "threshold": torch.rand(d_sae, generator=g),
        "r_mag": torch.randn(d_sae, generator=g),
        "b_mag": torch.randn(d_sae, generator=g),
    }


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _tensors(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))


def saelens(path: Path, w: Tensors, architecture: str = "standard", **settings: Any) -> Path:
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    if architecture == "jumprelu":
        names["threshold"] = "threshold"
    if architecture == "gated":
        names = {
            "W_enc": "W_enc",
            "b_gate": "b_enc",
            "b_mag": "b_mag",
            "r_mag": "r_mag",
            "W_dec": "W_dec",
            "b_dec": "b_dec",
        }
    _tensors(path / "sae_weights.safetensors", {theirs: w[ours] for theirs, ours in names.items()})
    d_in, d_sae = w["W_enc"].shape
    metadata = {"sae_lens_version": "6.54.12", "model_name": "gelu-1l", "hook_name": "blocks.0.mlp.hook_post"}
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata | settings.pop("metadata", {}),
        **({"k": K} if architecture == "topk" else {}),
        **settings,
    }
    _json(path / "cfg.json", config)
    return path


def dictionary_learning(path: Path, w: Tensors, kind: str = "AutoEncoder", **trainer: Any) -> Path:
    d_in, d_sae = w["W_enc"].shape
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    state = {
        "AutoEncoder": linear | {"bias": w["b_dec"]},
        "AutoEncoderNew": linear | {"decoder.bias": w["b_dec"]},
        "AutoEncoderTopK": linear | {"b_dec": w["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(-1.0)},
        "BatchTopKSAE": linear | {"b_dec": w["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(0.5)},
    }[kind]
    path.mkdir(parents=True, exist_ok=True)
    torch.save(state, path / "ae.pt")
    base = {
        "dict_class": kind,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "k": K,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_3",
    }
    _json(path / "config.json", {"trainer": base | trainer})
    return path


def sparsify(path: Path, w: Tensors, **settings: Any) -> Path:
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    _tensors(path / "sae.safetensors", tensors)
    config = {"expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K, "d_in": w["W_enc"].shape[0]}
    _json(path / "cfg.json", config | settings)
    return path


def llamascopium(path: Path, w: Tensors, act_fn: str = "relu", *, norm: float | None = None, **settings: Any) -> Path:
    place = "blocks.5.hook_mlp_out"
    tensors = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    if act_fn == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    if norm is not None:
        tensors[f"dataset_average_activation_norm.{place}"] = torch.tensor(norm)
    _tensors(path / "sae_weights.safetensors", tensors)
    config = {
        "sae_type": "sae",
        "d_model": w["W_enc"].shape[0],
        "expansion_factor": 20 / 6,
        "act_fn": act_fn,
        "top_k": K,
        "norm_activation": "inference" if norm is None else "dataset-wise",
        "sparsity_include_decoder_norm": False,
        "hook_point_in": place,
        "hook_point_out": place,
    }
    _json(path / "config.json", config | settings)
    return path


def nanda(path: Path, w: Tensors, **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    torch.save({name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}, path / "25.pt")
    d_in, d_sae = w["W_enc"].shape
    _json(path / "25_cfg.json", {"seed": 49, "d_mlp": d_in, "dict_mult": d_sae / d_in, "l1_coeff": 3e-4, **settings})
    return path / "25.pt"


def llama_scope(path: Path, w: Tensors, *, norm: float = 7.0, threshold: float = 0.4, **settings: Any) -> Path:
    """The first release: one threshold, and an average norm by which activations were scaled."""
    d_in, d_sae = w["W_enc"].shape
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    tensors |= {"decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}
    _tensors(path / "checkpoints" / "final.safetensors", tensors)
    config = {
        "d_model": d_in,
        "d_sae": d_sae,
        "expansion_factor": 8,
        "hook_point_in": "blocks.19.hook_resid_post",
        "hook_point_out": "blocks.19.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": threshold,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
        "use_glu_encoder": False,
        "device": "cuda:0",
        "seed": 42,
        "dtype": "torch.bfloat16",
        "bias_init_method": "all_zero",
        "init_encoder_with_decoder_transpose": True,
        "decoder_exactly_fixed_norm": False,
        "init_decoder_norm": 0.5,
        "init_encoder_norm": None,
        "lp": 1,
        "l1_coefficient": 8e-05,
        "l1_coefficient_warmup_steps": 78125,
        "k_warmup_steps": 78125,
        "use_batch_norm_mse": True,
        "use_ghost_grads": False,
        "tp_size": 1,
        "ddp_size": 1,
    }
    _json(path / "hyperparams.json", config | settings)
    return path


JUMPRELU = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def gemma_scope(path: Path, w: Tensors) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    np.savez(path / "params.npz", **{name: w[name].numpy() for name in JUMPRELU})
    return path


def gemma_scope_2(path: Path, w: Tensors, **settings: Any) -> Path:
    _tensors(path / "params.safetensors", {name.lower(): w[name] for name in JUMPRELU})
    config = {
        "hf_hook_point_in": "model.layers.17.output",
        "hf_hook_point_out": "model.layers.17.output",
        "width": w["W_enc"].shape[1],
        "model_name": "google/gemma-3-4b-pt",
        "architecture": "jump_relu",
        "l0": 150,
        "affine_connection": False,
        "type": "sae",
    }
    _json(path / "config.json", config | settings)
    return path


def goodfire(path: Path, w: Tensors, name: str = "Llama-3.1-8B-Instruct-SAE-l19.pth") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    state = {"encoder_linear.weight": w["W_enc"].T, "encoder_linear.bias": w["b_enc"]}
    state |= {"decoder_linear.weight": w["W_dec"].T, "decoder_linear.bias": w["b_dec"]}
    torch.save(state, path / name)
    return path / name


def qwen_scope(path: Path, w: Tensors, repository: str = f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}") -> Path:
    (path / repository).mkdir(parents=True, exist_ok=True)
    state = {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"], "W_dec": w["W_dec"].T, "b_dec": w["b_dec"]}
    torch.save(state, path / repository / "layer5.sae.pt")
    return path / repository / "layer5.sae.pt"


def openai(path: Path, w: Tensors, activation: str = "ReLU") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    settings = {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {}
    state = {
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "encoder.weight": w["W_enc"].T,
        "decoder.weight": w["W_dec"].T,
        "stats_last_nonzero": torch.zeros(w["b_enc"].shape, dtype=torch.long),
        "latents_activation_frequency": torch.ones(w["b_enc"].shape),
        "latents_mean_square": torch.zeros(20),
        "activation": activation,
        "activation_state_dict": settings,
    }
    torch.save(state, path / "8.pt")
    return path / "8.pt"


PEERS: dict[str, Callable[[Path, Tensors], Path]] = {
    "sae-lens": saelens,
    "dictionary-learning": dictionary_learning,
    "sparsify": lambda path, w: sparsify(path / "layers.3.mlp", w),
    "llamascopium": llamascopium,
    "llama-scope": llama_scope,
    "gemma-scope": gemma_scope,
    "gemma-scope-2": gemma_scope_2,
    "goodfire": goodfire,
    "qwen-scope": qwen_scope,
    "nanda": nanda,
    "openai": openai,
}
