"""Llamascopium's layout (formerly Language-Model-SAEs): `config.json` and `sae_weights.safetensors`.

Source: OpenMOSS/Language-Model-SAEs, `config.py`, `sae.py`, `models/sparse_dictionary.py`; its package 2.0.0b34.
Llama Scope's first release has another layout: `sae.interop.llama_scope`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files, settings
from sae.interop.files import InteropError
from sae.interop.hooks import hook_point

NAME = "llamascopium"
FILES = "config.json and sae_weights.safetensors"

_PLACES = tuple(
    f"{stem}.{ending}"
    for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for ending in ("safetensors", "pt")
)
_NORM = "dataset_average_activation_norm."
_NEW = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
_OLD = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
_HANDLED = settings.names("""
    act_fn apply_decoder_bias_to_pre_encoder d_model d_sae force_unit_decoder_norm hook_point_in hook_point_out
    model_name norm_activation sae_type sparsity_include_decoder_norm top_k use_decoder_bias use_glu_encoder
""")
_HARMLESS = settings.names("""
    bias_init_method ddp_size decoder_bias_init_method decoder_exactly_fixed_norm decoder_exactly_unit_norm device
    dtype expansion_factor init_decoder_norm init_encoder_norm init_encoder_with_decoder_transpose
    jump_relu_threshold jumprelu_threshold_grad_scale jumprelu_threshold_window k_warmup_steps l1_coefficient
    l1_coefficient_warmup_steps lp sae_pretrained_name_or_path seed sparsity_threshold_for_triton_spmm_kernel
    strict_loading tp_size use_batch_norm_mse use_ghost_grads use_triton_kernel version
""")


def detect(path: Path) -> bool:
    return (path / "config.json").is_file() and any((path / place).is_file() for place in _PLACES)


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of a directory written by Llamascopium; a constant input scale is folded in.

    Raises: InteropError when it is damaged, not a plain SAE, activates features depending on the rest of the batch, or
    has settings that are not known here.
    """
    where = path / "config.json"
    original = files.read_json(where)
    config = settings.without(original, ignore)
    act_fn = config.get("act_fn", "relu")
    _refuse_other_semantics(config, act_fn, where)
    held = _weights(path)
    place = assemble.first_text(config, "hook_point_in")
    names = dict(_OLD if "encoder.weight" in held else _NEW)
    if not config.get("use_decoder_bias", True):
        del names["b_dec"]
    if act_fn == "jumprelu":
        long = "activation_function.log_jumprelu_threshold"
        names["threshold"] = long if long in held else "log_jumprelu_threshold"
    tensors = assemble.take_tensors(held, names, where, ignored=[name for name in held if name.startswith(_NORM)])
    if "encoder.weight" in held:
        assemble.transpose(tensors, ("W_enc", "W_dec"), where)
    shape = assemble.shape_of(tensors, where)
    assemble.require_sizes(config, {"d_model": shape["d_in"], "d_sae": shape["d_sae"]}, where)
    tensors.setdefault("b_dec", torch.zeros(shape["d_out"]))
    if act_fn == "jumprelu":
        tensors["threshold"] = tensors["threshold"].exp()
    token_wise = config.get("norm_activation", "dataset-wise") == "token-wise"
    notes = _fold(tensors, config, act_fn, held.get(f"{_NORM}{place}"), where)
    return assemble.dictionary(
        where,
        tensors,
        {
            "activation": act_fn,
            "k": assemble.positive_int(config, "top_k", where) if act_fn == "topk" else None,
            "pre_bias": bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
            "row_norm": "unit_mean_square" if token_wise else None,
        },
        peer=NAME,
        kind=act_fn,
        hook_point=hook_point(place),
        model=assemble.first_text(config, "model_name"),
        config=original,
        notes=notes,
    )


def _weights(path: Path) -> dict[str, Any]:
    found = next(path / place for place in _PLACES if (path / place).is_file())
    return (
        files.read_safetensors(found)
        if found.suffix == ".safetensors"
        else assemble.section(files.read_pt(found), "sae")
    )


def _refuse_other_semantics(config: Mapping[str, Any], act_fn: object, where: Path) -> None:
    settings.refuse_unknown(config, _HANDLED | _HARMLESS, where)
    kind = config.get("sae_type", "sae")
    assemble.require(kind == "sae", where, f"its sae_type is {kind!r}; only sae can be read.")
    assemble.require(
        not config.get("use_glu_encoder"), where, "its encoder is gated by a second one (use_glu_encoder)."
    )
    place, target = assemble.first_text(config, "hook_point_in"), assemble.first_text(config, "hook_point_out")
    assemble.require(place == target, where, f"it is a transcoder: it reads {place} and predicts {target}.")
    assemble.require(
        act_fn in ("relu", "jumprelu", "topk"),
        where,
        f"its act_fn is {act_fn!r}; only relu, jumprelu and topk can be read. Which features a batchtopk activates "
        "depends on the rest of the batch; convert it to jumprelu with Llamascopium first.",
    )
    normalization = config.get("norm_activation", "dataset-wise")
    assemble.require(
        normalization in ("dataset-wise", "inference", "token-wise"),
        where,
        f"how it normalises activations depends on more than the row (norm_activation = {normalization!r}).",
    )


def _fold(tensors: dict[str, Tensor], config: Mapping[str, Any], act_fn: str, norm: Any, where: Path) -> list[str]:
    """Folds the input scale and, if the activation depends on them, the decoder norms; returns notes on what it did."""
    notes = []
    if config.get("sparsity_include_decoder_norm", True) and act_fn != "relu":
        norms = tensors["W_dec"].double().norm(dim=-1)
        assemble.require(
            bool((norms > 0).all()), where, "a row of its decoder is zero, and Llamascopium divides by its norm."
        )
        if act_fn == "jumprelu":
            assemble.rescale(tensors, {"threshold": 1 / norms})
        else:
            assemble.rescale(tensors, {"W_enc": norms, "b_enc": norms, "W_dec": 1 / norms[:, None]})
            notes.append(
                "activations are multiplied by the decoder norm: Llamascopium chooses the k largest by that product"
            )
    if config.get("norm_activation", "dataset-wise") == "dataset-wise":
        value = float(norm) if isinstance(norm, Tensor) and norm.numel() == 1 else math.nan
        if not (math.isfinite(value) and value > 0):
            raise InteropError(
                f"{where} cannot be imported: it was trained on activations scaled by their average norm, and that "
                "norm is not in the file. Save it with the norm folded in (norm_activation = inference)."
            )
        scale = math.sqrt(tensors["W_enc"].shape[0]) / value
        assemble.rescale(tensors, dict.fromkeys(("b_enc", "b_dec", "threshold"), 1 / scale))
        notes.append(f"input scale {scale!r} folded into biases and thresholds")
    return notes
