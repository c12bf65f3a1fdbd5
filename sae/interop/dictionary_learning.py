"""dictionary_learning's layout: `ae.pt` (a state dict) and `config.json` with a "trainer" section."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files
from sae.interop.hooks import hook_point, layer_of, short_hook_point
from store.common import write_json

NAME = "dictionary-learning"
FILES = 'ae.pt and config.json with a "trainer" section'

_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
_TENSORS = {  # ours → theirs, by class
    "AutoEncoder": _LINEAR | {"b_dec": "bias"},
    "AutoEncoderNew": _LINEAR | {"b_dec": "decoder.bias"},
    "AutoEncoderTopK": _LINEAR | {"b_dec": "b_dec"},
    "BatchTopKSAE": _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": _PLAIN,
    "JumpReluAutoEncoder": _PLAIN,
    "GatedAutoEncoder": {
        "W_enc": "encoder.weight",
        "b_enc": "gate_bias",
        "W_dec": "decoder.weight",
        "b_dec": "decoder_bias",
        "r_mag": "r_mag",
        "b_mag": "mag_bias",
    },
}
_ACTIVATIONS = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "gated",
}
_WITHOUT_PRE_BIAS = ("AutoEncoderNew", "JumpReluAutoEncoder")
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
}


# --- read ------------------------------------------------------------------------------------------------------------


def detect(path: Path) -> bool:
    return (path / "ae.pt").is_file() and (path / "config.json").is_file()


def read(path: Path) -> SAE:
    """The dictionary of a directory written by dictionary_learning, or by `write`. Decoder norms stay as they are.

    Raises: InteropError when it is damaged, of an unknown class, or a BatchTopK without an inference threshold.
    """
    where = path / "config.json"
    config = files.read_json(where)
    trainer = assemble.section(config, "trainer")
    kind = assemble.first_text(trainer, "dict_class") or ""
    assemble.require(kind in _TENSORS, where, f"unknown dict_class {kind!r}; known are {', '.join(_TENSORS)}.")
    held = files.read_pt(path / "ae.pt")
    tensors = assemble.take_tensors(held, _TENSORS[kind], path / "ae.pt", ignored=("k", "threshold", "group_sizes"))
    if "encoder.weight" in _TENSORS[kind].values():
        assemble.transpose(tensors, ("W_enc", "W_dec"), where)
    shape = assemble.shape_of(tensors, where)
    assemble.require_sizes(trainer, {"activation_dim": shape["d_in"], "dict_size": shape["d_sae"]}, where)
    activation = _ACTIVATIONS[kind]
    if activation == "batchtopk":
        assemble.require(
            tensors["threshold"].ndim == 0 and bool(tensors["threshold"] >= 0),
            where,
            "its inference threshold was never set (threshold_start_step is after the end of its training), so its "
            "active features depend on the rest of the batch.",
        )
        tensors["threshold"] = tensors["threshold"].expand(shape["d_sae"])
    place = assemble.first_text(trainer, "submodule_name")
    hook = short_hook_point(place, trainer.get("layer"))
    sae = assemble.dictionary(
        where,
        tensors,
        {
            "activation": activation,
            "k": assemble.positive_int({**trainer, **held}, "k", where) if "topk" in activation else None,
            "pre_bias": kind not in _WITHOUT_PRE_BIAS,
        },
        peer=NAME,
        kind=kind,
        hook_point=hook or hook_point(assemble.first_text(assemble.section(config, "buffer"), "submodule_name")),
        model=assemble.first_text(trainer, "lm_name"),
        config=config,
    )
    return assemble.restore_own_config(sae, assemble.section(config, assemble.OWN_CONFIG))


# --- write -----------------------------------------------------------------------------------------------------------


def write(sae: SAE, out: Path) -> Path:
    """Writes the layout into `out`; dictionary_learning then computes the same activations and reconstructions.

    Raises: InteropError for a transcoder, and for topk or gated without a pre-bias, for which it has no class.
    """
    assemble.require_exportable(sae.d_out == sae.d_in and not sae.skip, NAME, "it is a transcoder.")
    kind = _class_of(sae)
    assemble.require_exportable(
        sae.pre_bias or kind in _WITHOUT_PRE_BIAS,
        NAME,
        f"its class {kind} subtracts the decoder bias from the input, and this dictionary does not.",
    )
    files.write_pt(out / "ae.pt", _state(sae, kind))
    trainer = {
        "trainer_class": _TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "k": sae.k,
        "layer": layer_of(sae.config.get("hook_point")),
        "lm_name": sae.config.get("model", {}).get("id"),
        "submodule_name": sae.config.get("hook_point"),
        "steps": sae.config.get("train", {}).get("steps"),
        "device": "cpu",
    }
    write_json(out / "config.json", {"trainer": trainer, assemble.OWN_CONFIG: assemble.own_config(sae)})
    return out


def _class_of(sae: SAE) -> str:
    """The peer's class that computes the same.

    Its AutoEncoder is rescaled on loading if decoder norms are not 1, so such a dictionary is written as its JumpReLU
    with a threshold of 0, which is not rescaled.
    """
    norms = sae.W_dec.norm(dim=-1)
    match sae.activation:
        case "relu":
            unit = sae.pre_bias and torch.allclose(norms, torch.ones_like(norms))
            return "AutoEncoder" if unit else "JumpReluAutoEncoder"
        case "batchtopk":
            same = sae.pre_bias and bool((sae.threshold == sae.threshold[0]).all())
            return "BatchTopKSAE" if same else "JumpReluAutoEncoder"
    return {"topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder", "gated": "GatedAutoEncoder"}[sae.activation]


def _state(sae: SAE, kind: str) -> dict[str, Tensor]:
    ours = sae.tensors()
    if kind == "JumpReluAutoEncoder":
        ours.setdefault("threshold", torch.zeros(sae.d_sae))
        if sae.pre_bias:  # this class subtracts nothing from the input, so b_enc must
            ours["b_enc"] = (ours["b_enc"].double() - ours["b_dec"].double() @ ours["W_enc"].double()).float()
    state = {
        theirs: ours[name].t() if theirs in ("encoder.weight", "decoder.weight") else ours[name]
        for name, theirs in _TENSORS[kind].items()
    }
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        state["k"] = torch.tensor(sae.k, dtype=torch.int32)
        state["threshold"] = ours["threshold"][0].clone() if kind == "BatchTopKSAE" else torch.tensor(-1.0)
    return state
