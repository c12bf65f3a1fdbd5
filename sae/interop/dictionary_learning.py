"""dictionary_learning's layout: `ae.pt` (a state dict) and `config.json` with a "trainer" section.

Older configurations name no class, or have no such section; then the class is recognised by the tensors.
Source: saprmarks/dictionary_learning, `dictionary.py`, `training.py` and `trainers/`; its package 0.1.0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files, settings
from sae.interop.hooks import hook_point, layer_of, short_hook_point
from store.common import write_json

NAME = "dictionary-learning"
FILES = "ae.pt and config.json"

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
_BY_TRAINER = {  # classes whose tensors have the same names, by what trained them
    "TopKTrainer": "AutoEncoderTopK",
    "TrainerTopK": "AutoEncoderTopK",
    "BatchTopKTrainer": "BatchTopKSAE",
    "TrainerBatchTopK": "BatchTopKSAE",
}
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
}
_BUFFERS = ("k", "threshold", "group_sizes")  # in a file besides the parameters of its class
_HANDLED = settings.names("""
    activation_dim dict_class dict_size k layer lm_name submodule_name trainer_class
""")
_HARMLESS = settings.names("""
    anneal_end anneal_start auxk_alpha bandwidth decay_end decay_start device dict_class_kwargs group_fractions
    group_sizes group_weights initial_sparsity_penalty l1_annealing_steps l1_penalty lr momentum n_sparsity_updates
    norm_factor p_end p_start resample_steps seed sparsity_coefficient sparsity_function sparsity_penalty
    sparsity_queue_length sparsity_warmup_steps steps target_l0 temperature threshold_beta threshold_start_step
    top_k_aux use_wandb wandb_entity wandb_group wandb_name wandb_project warmup_steps
""")
_BUFFER = settings.names("""
    ctx_len d_submodule device io layer n_ctxs out_batch_size refresh_batch_size submodule_name
""")


# --- read ------------------------------------------------------------------------------------------------------------


def detect(path: Path) -> bool:
    return (path / "ae.pt").is_file() and (path / "config.json").is_file()


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of a directory written by dictionary_learning, or by `write`. Decoder norms stay as they are.

    Raises: InteropError when it is damaged, of an unknown class, a BatchTopK without an inference threshold, or has
    settings that are not known here.
    """
    where = path / "config.json"
    original = files.read_json(where)
    config = settings.without(original, ignore)
    trainer, buffer = _sections(config, where)
    held = files.read_pt(path / "ae.pt")
    kind = _class_in(trainer, held, where)
    tensors = assemble.take_tensors(held, _TENSORS[kind], path / "ae.pt", ignored=_BUFFERS)
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
    place, notes = _place(trainer, buffer, where)
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
        hook_point=place,
        model=assemble.first_text(trainer, "lm_name"),
        config=original,
        notes=notes + ([] if "dict_class" in trainer else [f"recognised as {kind} by its tensors"]),
    )
    return assemble.restore_own_config(sae, assemble.section(config, assemble.OWN_CONFIG))


def _sections(config: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the trainer and of the activation buffer. Oldest files have the trainer's at the top."""
    trainer, buffer = assemble.section(config, "trainer"), assemble.section(config, "buffer")
    if trainer:
        settings.refuse_unknown(config, ("trainer", "buffer", assemble.OWN_CONFIG), where)
    else:
        trainer = {name: value for name, value in config.items() if name not in ("buffer", assemble.OWN_CONFIG)}
    settings.refuse_unknown(trainer, _HANDLED | _HARMLESS | {"io"}, where)
    settings.refuse_unknown(buffer, _BUFFER, where)
    return trainer, buffer


def _class_in(trainer: Mapping[str, Any], held: Mapping[str, Any], where: Path) -> str:
    """The dictionary's class as named, or by its tensors and trainer. Raises: InteropError if that leaves several."""
    named = trainer.get("dict_class")
    if named is not None:
        assemble.require(
            isinstance(named, str) and named in _TENSORS,
            where,
            f"unknown dict_class {named!r}; known are {', '.join(_TENSORS)}.",
        )
        return str(named)
    names = set(map(str, held)) - set(_BUFFERS)
    fitting = [kind for kind, tensors in _TENSORS.items() if names == set(tensors.values()) - {"threshold"}]
    if "W_enc" in names:  # the two classes with these names: only one of them has groups
        fitting = ["MatryoshkaBatchTopKSAE" if "group_sizes" in held else "JumpReluAutoEncoder"]
    by_trainer = _BY_TRAINER.get(str(trainer.get("trainer_class")))
    fitting = [by_trainer] if by_trainer in fitting else fitting
    assemble.require(
        len(fitting) == 1,
        where,
        f"it names no dict_class, and its tensors ({', '.join(sorted(map(str, held)))}) fit "
        f'{" and ".join(fitting) or "no class known here"}. Write "dict_class" into its trainer section.',
    )
    return fitting[0]


def _place(trainer: Mapping[str, Any], buffer: Mapping[str, Any], where: Path) -> tuple[str | None, list[str]]:
    """The hook point it reads; unknown for a module's input, for which the files have no name."""
    io = buffer.get("io", trainer.get("io", "out"))
    assemble.require(io in ("in", "out"), where, f"it is a transcoder: it was trained on io = {io!r}.")
    if io == "in":
        named = assemble.first_text(trainer, "submodule_name") or "its module"
        return None, [f"it reads the input of {named}, not its output (buffer.io = in)"]
    hook = short_hook_point(assemble.first_text(trainer, "submodule_name"), trainer.get("layer"))
    return hook or hook_point(assemble.first_text(buffer, "submodule_name")), []


# --- write -----------------------------------------------------------------------------------------------------------


def write(sae: SAE, out: Path) -> Path:
    """Writes the layout into `out`; dictionary_learning then computes the same activations and reconstructions.

    Raises: InteropError for a transcoder, and for topk or gated without a pre-bias, for which it has no class.
    """
    assemble.require_exportable(sae.d_out == sae.d_in and not sae.skip, NAME, "it is a transcoder.")
    assemble.require_exportable(sae.row_norm is None, NAME, f"it normalises each row by itself ({sae.row_norm}).")
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
