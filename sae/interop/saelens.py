"""SAELens' layout: `cfg.json` and `sae_weights.safetensors`.

Its package is not used: it needs an older transformer-lens and cannot share our environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files
from sae.interop.files import InteropError
from sae.interop.hooks import hook_point
from sae.jobs.checkpoint import write_tensors
from store.common import contexts_begin_with_bos, write_json

NAME = "sae-lens"
FILES = "cfg.json and sae_weights.safetensors"
ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}
# Without a version its loader uses old code that loses hook_name. This layout is the one of version 6.0.
LAYOUT_VERSION = "6.0.0"
UNKNOWN = "unknown"

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
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            "model_name": sae.config.get("model", {}).get("id", UNKNOWN),
            "hook_name": sae.config.get("hook_point") or UNKNOWN,
            "hook_head_index": None,
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
    for origin in ("store", "live"):
        if origin in config:
            return contexts_begin_with_bos(config[origin])
    theirs = assemble.section(assemble.section(config, "imported"), "config")
    return bool({**theirs, **assemble.section(theirs, "metadata")}.get("prepend_bos", True))


# --- read ------------------------------------------------------------------------------------------------------------


def detect(path: Path) -> bool:
    return (path / "cfg.json").is_file() and (path / "sae_weights.safetensors").is_file()


def read(path: Path) -> SAE:
    """The dictionary of a directory written by SAELens (of any version), or by `write`.

    Raises: InteropError when it is damaged, or does what ours cannot: normalisation per token, a single attention
    head, a transcoder.
    """
    where = path / "cfg.json"
    config = files.read_json(where)
    metadata = assemble.section(config, "metadata")
    architecture, k = _architecture(config, where)
    _refuse_other_semantics(config, metadata, where)
    held = files.read_safetensors(path / "sae_weights.safetensors")
    _refuse_fine_tuned(held, where)
    tensors = assemble.take_tensors(held, _TENSORS[architecture], where, ignored=("scaling_factor",))
    shape = assemble.shape_of(tensors, where)
    assemble.require_sizes(config, {"d_in": shape["d_in"], "d_sae": shape["d_sae"]}, where)
    notes = _fold(tensors, config, path)
    if "batchtopk" in architecture:  # one threshold for all features
        tensors["threshold"] = tensors["threshold"].expand(shape["d_sae"])
    activation = {"standard": "relu", "matryoshka_batchtopk": "batchtopk"}.get(architecture, architecture)
    ours = assemble.section(metadata, assemble.OWN_CONFIG)
    if activation == "jumprelu" and ours.get("activation") == "batchtopk":
        activation, k = "batchtopk", assemble.positive_int(ours, "k", where)
    place = assemble.first_text(metadata, "hook_name") or assemble.first_text(config, "hook_name", "hook_point")
    model = assemble.first_text(metadata, "model_name") or assemble.first_text(config, "model_name")
    sae = assemble.dictionary(
        where,
        tensors,
        {"activation": activation, "k": k, "pre_bias": bool(config.get("apply_b_dec_to_input", True))},
        peer=NAME,
        kind=architecture,
        hook_point=hook_point(place),
        model=None if model == UNKNOWN else model,
        config=config,
        notes=notes,
    )
    return assemble.restore_own_config(sae, ours)


def _architecture(config: Mapping[str, Any], where: Path) -> tuple[str, int | None]:
    """Its architecture and k, also in the form that versions before 6 wrote."""
    architecture = config.get("architecture", "standard")
    activation = assemble.first_text(config, "activation_fn", "activation_fn_str") or "relu"
    settings = {**assemble.section(config, "activation_fn_kwargs"), **config}
    if activation == "topk" and architecture in ("standard", "topk"):
        architecture = "topk"
    else:
        assemble.require(
            activation == "relu", where, f"its activation function is {activation!r}; only ReLU can be read."
        )
    if not isinstance(architecture, str) or architecture not in _TENSORS:
        raise InteropError(f"{where}: unknown architecture {architecture!r}; known are {', '.join(_TENSORS)}.")
    if architecture in ("batchtopk", "matryoshka_batchtopk"):  # its k is an average, possibly a fraction
        settings["k"] = max(1, round(settings["k"])) if isinstance(settings.get("k"), float) else settings.get("k")
    return architecture, assemble.positive_int(settings, "k", where) if "topk" in architecture else None


def _refuse_other_semantics(config: Mapping[str, Any], metadata: Mapping[str, Any], where: Path) -> None:
    known = {**metadata, **config}
    place = assemble.first_text(known, "hook_name", "hook_point") or ""
    normalize = known.get("normalize_activations")
    assemble.require(
        normalize in (None, False, "none", True, "expected_average_only_in"),
        where,
        f"it normalises each token's activations separately ({normalize!r}); ours takes them unchanged.",
    )
    assemble.require(
        known.get("reshape_activations") in (None, "none") and not place.endswith("hook_z"),
        where,
        "it joins the heads of hook_z into one vector, and our stores hold the model's activations unchanged.",
    )
    assemble.require(known.get("hook_head_index") is None, where, "it reads a single attention head.")
    target = assemble.first_text(known, "hook_name_out")
    assemble.require(target in (None, place), where, f"it is a transcoder: it reads {place} and predicts {target}.")


def _refuse_fine_tuned(held: Mapping[str, Tensor], where: Path) -> None:
    factor = held.get("scaling_factor")
    assemble.require(
        factor is None or bool((factor == 1).all()),
        where,
        "its activations are rescaled after fine-tuning (scaling_factor), and ours have no such factor.",
    )


def _fold(tensors: dict[str, Tensor], config: Mapping[str, Any], path: Path) -> list[str]:
    """Folds the scales that SAELens applies at run time into the weights; returns notes on what it did."""
    notes = []
    rescaled = bool(config.get("rescale_acts_by_decoder_norm"))
    if config.get("normalize_activations") in (True, "expected_average_only_in"):
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
