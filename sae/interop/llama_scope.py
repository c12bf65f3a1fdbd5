"""Llama Scope's first release (Llama 3.1 8B): `hyperparams.json` and `checkpoints/final.safetensors`.

Its owners' loader divides the encoder's bias by the input scale s = √d / (average norm), gives decoder rows unit norm,
and then compares with one threshold: with norms ‖d‖ of the decoder's rows,
`h = (x W_enc + b_enc / s) ‖d‖`, `f = h where h > jump_relu_threshold`, `x̂ = f W_dec / ‖d‖ + b_dec / s`.
Source: He et al. 2024 (arXiv 2410.20526); OpenMOSS/Language-Model-SAEs, `sae.py` (`standardize_parameters_of_dataset_
activation_scaling`, `transform_to_unit_decoder_norm`) and the repositories' hyperparams.json.
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
from sae.interop.hooks import hook_point

NAME = "llama-scope"
FILES = "hyperparams.json and checkpoints/final.safetensors"

_TENSORS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
_HANDLED = settings.names("""
    act_fn apply_decoder_bias_to_pre_encoder d_model d_sae dataset_average_activation_norm hook_point_in
    hook_point_out jump_relu_threshold model_name norm_activation sparsity_include_decoder_norm top_k
    use_decoder_bias use_glu_encoder
""")
_HARMLESS = settings.names("""
    bias_init_method ddp_size decoder_bias_init_method decoder_exactly_fixed_norm decoder_exactly_unit_norm device
    dtype expansion_factor ghost_grads_per_feature init_decoder_norm init_encoder_norm
    init_encoder_with_decoder_transpose k_warmup_steps l1_coefficient l1_coefficient_warmup_steps lp
    remove_gradient_parallel_to_decoder_directions run_name sae_pretrained_name_or_path seed strict_loading tp_size
    use_batch_norm_mse use_ghost_grads
""")


def _weights(path: Path) -> Path:
    return path / "checkpoints" / "final.safetensors"


def detect(path: Path) -> bool:
    return (path / "hyperparams.json").is_file() and _weights(path).is_file()


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of one directory, in the model's own units and with unit decoder rows.

    Raises: InteropError when it is damaged, a transcoder, or has settings that are not known here.
    """
    where = path / "hyperparams.json"
    original = files.read_json(where)
    config = settings.without(original, ignore)
    act_fn = _refuse_other_semantics(config, where)
    names = dict(_TENSORS)
    if not config.get("use_decoder_bias", True):
        del names["b_dec"]
    tensors = assemble.take_tensors(files.read_safetensors(_weights(path)), names, _weights(path))
    assemble.transpose(tensors, ("W_enc", "W_dec"), where)
    shape = assemble.shape_of(tensors, where)
    assemble.require_sizes(config, {"d_model": shape["d_in"], "d_sae": shape["d_sae"]}, where)
    tensors.setdefault("b_dec", torch.zeros(shape["d_out"]))
    scale = _input_scale(config, shape["d_in"], where)
    assemble.rescale(tensors, dict.fromkeys(("b_enc", "b_dec"), 1 / scale))
    notes = [f"input scale {scale!r} folded into the biases"]
    notes += _fold_decoder_norms(tensors, config, act_fn)
    if act_fn == "jumprelu":
        tensors["threshold"] = torch.full((shape["d_sae"],), _threshold(config, where))
    place = assemble.first_text(config, "hook_point_in")
    return assemble.dictionary(
        where,
        tensors,
        {
            "activation": act_fn,
            "k": assemble.positive_int(config, "top_k", where) if act_fn == "topk" else None,
            "pre_bias": bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        },
        peer=NAME,
        kind=act_fn,
        hook_point=hook_point(place),
        model=assemble.first_text(config, "model_name") or "meta-llama/Llama-3.1-8B",
        config=original,
        notes=notes,
    )


def _refuse_other_semantics(config: Mapping[str, Any], where: Path) -> str:
    settings.refuse_unknown(config, _HANDLED | _HARMLESS, where)
    act_fn = config.get("act_fn", "jumprelu")
    assemble.require(
        act_fn in ("jumprelu", "topk", "relu"), where, f"its act_fn is {act_fn!r}; known are jumprelu, topk and relu."
    )
    assemble.require(settings.is_off(config.get("use_glu_encoder")), where, "its encoder is gated by a second one.")
    place, target = assemble.first_text(config, "hook_point_in"), assemble.first_text(config, "hook_point_out")
    assemble.require(target in (None, place), where, f"it is a transcoder: it reads {place} and predicts {target}.")
    normalization = config.get("norm_activation", "dataset-wise")
    assemble.require(
        normalization == "dataset-wise",
        where,
        f"its norm_activation is {normalization!r}; this release has dataset-wise only.",
    )
    return str(act_fn)


def _input_scale(config: Mapping[str, Any], d_in: int, where: Path) -> float:
    norm = assemble.section(config, "dataset_average_activation_norm").get("in")
    valid = isinstance(norm, int | float) and not isinstance(norm, bool) and math.isfinite(norm) and norm > 0
    assemble.require(valid, where, f"dataset_average_activation_norm.in must be a positive number; got {norm!r}.")
    assert isinstance(norm, int | float)
    return math.sqrt(d_in) / norm


def _threshold(config: Mapping[str, Any], where: Path) -> float:
    found = config.get("jump_relu_threshold")
    valid = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    assemble.require(valid, where, f"jump_relu_threshold must be a number; got {found!r}.")
    assert isinstance(found, int | float)
    return float(found)


def _fold_decoder_norms(tensors: dict[str, Tensor], config: Mapping[str, Any], act_fn: str) -> list[str]:
    """Unit decoder rows, by which features are compared with the threshold. Published rows have unit norm already."""
    norms = tensors["W_dec"].double().norm(dim=-1)
    if act_fn == "relu" or not config.get("sparsity_include_decoder_norm") or bool((norms == 0).any()):
        return []
    assemble.rescale(tensors, {"W_enc": norms, "b_enc": norms, "W_dec": 1 / norms[:, None]})
    return ["decoder rows have unit norm: the threshold is compared with activation times norm"]
