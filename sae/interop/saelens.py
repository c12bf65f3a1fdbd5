"""SAELens' layout: `cfg.json` and `sae_weights.safetensors`.

Its package is not used: it needs an older transformer-lens and cannot share our environment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.trained_rows import trained_with_context_bos
from sae.interop import assemble, files, saelens_settings, settings
from sae.interop.files import InteropError
from sae.interop.hooks import hook_point
from sae.interop.processed_model import fold_centring
from sae.jobs.checkpoint import write_tensors
from store.common import write_json

NAME = "sae-lens"
FILES = "cfg.json and sae_weights.safetensors"
ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}
# Without a version its loader uses old code that loses hook_name. This layout is the one of version 6.0.
LAYOUT_VERSION = "6.0.0"
UNKNOWN = "unknown"
WHITENING = "activation_whitening.safetensors"
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")
_NORMALIZE = {"layer_norm": "layer_norm", "unit_mean_square": "constant_norm_rescale"}  # our row norms

_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_TENSORS = {  # ours → theirs, by architecture; the last two are checkpoints saved during training
    "standard": _PLAIN,
    "topk": _PLAIN,
    "jumprelu": _PLAIN | {"threshold": "threshold"},
    "gated": _PLAIN | {"b_enc": "b_gate", "b_mag": "b_mag", "r_mag": "r_mag"},
    "batchtopk": _PLAIN | {"threshold": "topk_threshold"},
    "matryoshka_batchtopk": _PLAIN | {"threshold": "topk_threshold"},
}


# --- write -----------------------------------------------------------------------------------------------------------


def write(sae: SAE, out: Path) -> Path:
    """Writes the layout into `out`; SAELens then computes the same activations and reconstructions.

    Raises: InteropError for a transcoder.
    """
    assemble.require_exportable(sae.d_out == sae.d_in and not sae.skip, NAME, "it is a transcoder.")
    architecture = ARCHITECTURES[sae.activation]
    tensors = sae.tensors()
    write_tensors(
        out / "sae_weights.safetensors", {theirs: tensors[ours] for ours, theirs in _TENSORS[architecture].items()}, {}
    )
    write_json(out / "cfg.json", config_of(sae))
    return out


def config_of(sae: SAE) -> dict[str, Any]:
    """SAELens' cfg.json for a dictionary."""
    trained = sae.config.get("train", {})
    config: dict[str, Any] = {
        "architecture": ARCHITECTURES[sae.activation],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.pre_bias,
        "normalize_activations": _NORMALIZE.get(str(sae.row_norm), "none"),
        "reshape_activations": "hook_z" if str(sae.config.get("hook_point")).endswith(".hook_z") else "none",
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            "model_name": sae.config.get("model", {}).get("id", UNKNOWN),
            "hook_name": sae.config.get("hook_point") or UNKNOWN,
            "hook_head_index": None,
            "model_from_pretrained_kwargs": {"center_writing_weights": sae.row_norm == "mean"},
            "prepend_bos": _prepends_bos(sae.config),
            "dataset_path": (sae.config.get("store") or sae.config.get("live") or {}).get("text", UNKNOWN),
            "training_tokens": trained.get("tokens"),
            "recipe": trained.get("recipe"),
            assemble.OWN_CONFIG: {**assemble.own_config(sae), "activation": sae.activation, "k": sae.k},
        },
    }
    if sae.activation == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return config


def _prepends_bos(config: Mapping[str, Any]) -> bool:
    """Whether the contexts of training began with BOS; as SAELens does by default where that is not known."""
    ours = trained_with_context_bos(config)
    if ours is not None:
        return ours
    theirs = assemble.section(assemble.section(config, "imported"), "config")
    return bool({**theirs, **assemble.section(theirs, "metadata")}.get("prepend_bos", True))


# --- read ------------------------------------------------------------------------------------------------------------


def detect(path: Path) -> bool:
    return (path / "cfg.json").is_file() and (path / "sae_weights.safetensors").is_file()


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of a directory written by SAELens (of any version), or by `write`.

    Raises: InteropError when it is damaged, does what ours cannot (a single attention head, a transcoder), or has
    settings that are not known here.
    """
    where = path / "cfg.json"
    original = files.read_json(where)
    config = settings.without(original, ignore)
    known = saelens_settings.flat(config)
    saelens_settings.refuse_other_semantics(config, known, where)
    architecture, k = _architecture(known, where)
    held = files.read_safetensors(path / "sae_weights.safetensors")
    tensors = assemble.take_tensors(held, _TENSORS[architecture], where, ignored=_FACTORS)
    shape = assemble.shape_of(tensors, where)
    assemble.require_sizes(known, {"d_in": shape["d_in"], "d_sae": shape["d_sae"]}, where)
    pre_bias = bool(known.get("apply_b_dec_to_input", True))
    row_norm = saelens_settings.row_norm(known, where)
    centred = saelens_settings.is_centred(config, known, where, ignore) and row_norm != "layer_norm"
    assemble.require(
        not (centred and row_norm),
        where,
        "it scales each row without its mean to a constant norm (center_writing_weights and constant_norm_rescale).",
    )
    notes = saelens_settings.remarks(known, centred_unsaid=centred and "model_from_pretrained_kwargs" not in known)
    notes += _fold_factors(tensors, held, known, where)
    notes += _fold_scales(tensors, known, architecture, path)
    notes += _fold_whitening(tensors, known, path, pre_bias=pre_bias)
    if centred:
        notes.append(fold_centring(tensors, pre_bias=pre_bias))
    if "batchtopk" in architecture:  # one threshold for all features
        tensors["threshold"] = tensors["threshold"].expand(shape["d_sae"])
    activation = {"standard": "relu", "matryoshka_batchtopk": "batchtopk"}.get(architecture, architecture)
    ours = assemble.section(assemble.section(config, "metadata"), assemble.OWN_CONFIG)
    if activation == "jumprelu" and ours.get("activation") == "batchtopk":
        activation, k = "batchtopk", assemble.positive_int(ours, "k", where)
    model = assemble.first_text(known, "model_name")
    sae = assemble.dictionary(
        where,
        tensors,
        {"activation": activation, "k": k, "pre_bias": pre_bias, "row_norm": "mean" if centred else row_norm},
        peer=NAME,
        kind=architecture,
        hook_point=hook_point(assemble.first_text(known, "hook_name")),
        model=None if model == UNKNOWN else model,
        config=original,
        notes=notes,
    )
    return assemble.restore_own_config(sae, ours)


def _architecture(known: Mapping[str, Any], where: Path) -> tuple[str, int | None]:
    """Its architecture and k, also in the form that versions before 6 wrote."""
    architecture = known.get("architecture", "standard")
    activation = assemble.first_text(known, "activation_fn") or "relu"
    found = {**assemble.section(known, "activation_fn_kwargs"), **known}
    if activation == "topk" and architecture in ("standard", "topk"):
        architecture = "topk"
    else:
        assemble.require(
            activation == "relu", where, f"its activation function is {activation!r}; only ReLU can be read."
        )
    if not isinstance(architecture, str) or architecture not in _TENSORS:
        raise InteropError(f"{where}: unknown architecture {architecture!r}; known are {', '.join(_TENSORS)}.")
    if architecture in ("batchtopk", "matryoshka_batchtopk"):  # its k is an average, possibly a fraction
        found["k"] = max(1, round(found["k"])) if isinstance(found.get("k"), float) else found.get("k")
    return architecture, assemble.positive_int(found, "k", where) if "topk" in architecture else None


def _fold_factors(
    tensors: dict[str, Tensor], held: Mapping[str, Tensor], known: Mapping[str, Any], where: Path
) -> list[str]:
    """Folds the factors of a fine-tuned decoder into it: `(f · factor) W_dec` = `f (factor · W_dec)`.

    Versions before 3 had no setting and always applied `scaling_factor`; a factor of 1 says nothing.
    """
    found = [held[name] for name in _FACTORS if name in held]
    said = known.get("finetuning_scaling_factor")
    if not found or all(bool((factor == 1).all()) for factor in found):
        assemble.require(
            bool(found) or settings.is_off(said),
            where,
            "its activations were rescaled by fine-tuning (finetuning_scaling_factor), and the factors are not in the "
            "file.",
        )
        return []
    factor = found[0]
    assemble.require(len(found) == 1, where, f"it holds both {' and '.join(_FACTORS)}; which applies is not known.")
    assemble.require(
        said is not False,
        where,
        "it holds factors of a fine-tuned decoder (scaling_factor), and its configuration says that none is used "
        "(finetuning_scaling_factor = false). If they are used: --ignore finetuning_scaling_factor.",
    )
    assemble.require(
        factor.shape == tensors["b_enc"].shape and bool(torch.isfinite(factor).all()),
        where,
        f"its scaling_factor must be {len(tensors['b_enc']):,} finite numbers.",
    )
    assemble.rescale(tensors, {"W_dec": factor.double()[:, None]})
    return ["factors of a fine-tuned decoder (scaling_factor) folded into W_dec"]


def _fold_scales(tensors: dict[str, Tensor], known: Mapping[str, Any], architecture: str, path: Path) -> list[str]:
    """Folds the scales that SAELens applies at run time into the weights; returns notes on what it did."""
    notes = []
    rescaled = not settings.is_off(known.get("rescale_acts_by_decoder_norm"))
    assemble.require(
        not rescaled or "topk" in architecture,
        path / "cfg.json",
        f"rescale_acts_by_decoder_norm belongs to topk and batchtopk, and this is {architecture}.",
    )
    if known.get("normalize_activations") in (True, "expected_average_only_in"):
        scale = _input_scale(path)
        assemble.rescale(tensors, {"W_enc": scale, "W_dec": 1 / scale, "b_dec": 1 / scale})
        if rescaled:  # its thresholds are in units of activation times decoder norm, which has just been divided
            assemble.rescale(tensors, {"threshold": 1 / scale})
        notes.append(f"input scale {scale!r} folded into the weights")
    if rescaled:
        norms = tensors["W_dec"].double().norm(dim=-1).clamp_min(1e-8)
        assemble.rescale(tensors, {"W_enc": norms, "b_enc": norms, "W_dec": 1 / norms[:, None]})
        notes.append("decoder norms folded into the encoder (rescale_acts_by_decoder_norm)")
    return notes


def _input_scale(path: Path) -> float:
    scaler = path / "activation_scaler.json"
    scale = files.read_json(scaler).get("scaling_factor") if scaler.is_file() else None
    if isinstance(scale, bool) or not isinstance(scale, float | int) or scale <= 0:
        raise InteropError(
            f"{path / 'cfg.json'} cannot be imported: it was trained on activations scaled by a constant that is not "
            'in the file (normalize_activations = "expected_average_only_in", no activation_scaler.json). Fold it '
            "with SAELens (fold_activation_norm_scaling_factor), save, and import that."
        )
    return float(scale)


def _fold_whitening(tensors: dict[str, Tensor], known: Mapping[str, Any], path: Path, *, pre_bias: bool) -> list[str]:
    """Folds `z = (x − mean) M` and `x̂ = ẑ M⁻¹ + mean` into the weights. Source: arXiv 2511.13981."""
    if known.get("normalize_activations") != "covariance_whitening":
        return []
    where, d_in = path / WHITENING, tensors["W_enc"].shape[0]
    assemble.require(
        where.is_file(),
        path / "cfg.json",
        f"it was trained on whitened activations, and their statistics ({WHITENING}) are not next to it.",
    )
    names = {name: name for name in ("mean", "matrix", "inverse_matrix")}
    found = {name: t.double() for name, t in assemble.take_tensors(files.read_safetensors(where), names, where).items()}
    shapes = {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)}
    assemble.require(
        all(tuple(found[name].shape) == shape for name, shape in shapes.items()), where, f"its shapes must be {shapes}."
    )
    W_enc = found["matrix"] @ tensors["W_enc"].double()
    if not pre_bias:  # with one, the new b_dec subtracts the mean from the input
        assemble.shift_encoder(tensors, -found["mean"] @ W_enc)
    tensors["W_enc"] = W_enc.float()
    tensors["W_dec"] = (tensors["W_dec"].double() @ found["inverse_matrix"]).float()
    tensors["b_dec"] = (tensors["b_dec"].double() @ found["inverse_matrix"] + found["mean"]).float()
    return ["whitening of the activations (covariance_whitening) folded into the weights"]
