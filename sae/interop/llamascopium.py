"""Llamascopium's layout (formerly Language-Model-SAEs): `config.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files
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


def detect(path: Path) -> bool:
    return (path / "config.json").is_file() and any((path / place).is_file() for place in _PLACES)


def read(path: Path) -> SAE:
    """The dictionary of a directory written by Llamascopium: no pre-bias; a constant input scale is folded in.

    Raises: InteropError when it is damaged, not a plain SAE, or activates features depending on the rest of the batch.
    """
    where = path / "config.json"
    config = files.read_json(where)
    act_fn = config.get("act_fn", "relu")
    _refuse_other_semantics(config, act_fn, where)
    held = _weights(path)
    place = assemble.first_text(config, "hook_point_in")
    norm = held.get(f"{_NORM}{place}")
    names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D"}
    names |= {"b_dec": "b_D"} if config.get("use_decoder_bias", True) else {}
    names |= {"threshold": "activation_function.log_jumprelu_threshold"} if act_fn == "jumprelu" else {}
    tensors = assemble.take_tensors(held, names, where, ignored=[name for name in held if name.startswith(_NORM)])
    shape = assemble.shape_of(tensors, where)
    assemble.require_sizes(config, {"d_model": shape["d_in"]}, where)
    tensors.setdefault("b_dec", torch.zeros(shape["d_out"]))
    if act_fn == "jumprelu":
        tensors["threshold"] = tensors["threshold"].exp()
    notes = _fold(tensors, config, act_fn, norm, where)
    return assemble.dictionary(
        where,
        tensors,
        {
            "activation": act_fn,
            "k": assemble.positive_int(config, "top_k", where) if act_fn == "topk" else None,
            "pre_bias": False,
        },
        peer=NAME,
        kind=act_fn,
        hook_point=hook_point(place),
        model=assemble.first_text(config, "model_name"),
        config=config,
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
        normalization in ("dataset-wise", "inference"),
        where,
        f"it normalises activations separately for every {normalization}; ours takes them unchanged.",
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
