"""Gemma Scope 2 (Gemma 3): `params.safetensors` and `config.json` in one directory for each dictionary.

JumpReLU without a pre-bias. Without a config.json, the directory's name and those above it tell model and hook point,
as in the repositories `google/gemma-scope-2-<size>-<pt|it>/<site>/layer_L_width_W_l0_N`.
Source: the repositories' README and config.json; SAELens' `gemma_3_sae_huggingface_loader`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files, settings

NAME = "gemma-scope-2"
FILES = "params.safetensors and config.json"

_TENSORS = {"W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec", "threshold": "threshold"}
_HANDLED = settings.names("""
    affine_connection architecture hf_hook_point_in hf_hook_point_out model_name type width
""")
_PLACES = {  # Hugging Face's module output or input → TransformerLens' hook point
    r"output": "hook_resid_post",
    r"self_attn\.o_proj\.input": "attn.hook_z",
    r"post_feedforward_layernorm\.output": "hook_mlp_out",
    r"post_attention_layernorm\.output": "hook_attn_out",
}
_SITES = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
_OTHER_KINDS = ("transcoder", "clt", "crosscoder")


def detect(path: Path) -> bool:
    file = path if path.is_file() else path / "params.safetensors"
    return file.name == "params.safetensors" and file.is_file()


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of one directory.

    Raises: InteropError when it is damaged, a transcoder or crosscoder, or has settings that are not known here.
    """
    directory = path.parent if path.is_file() else path
    where = directory / "config.json"
    original = files.read_json(where) if where.is_file() else {}
    config = settings.without(original, ignore)
    inside = "/".join(directory.absolute().parts[1:])
    settings.refuse_unknown(config, _HANDLED | {"l0"}, where)
    kind = config.get("type", next((name for name in _OTHER_KINDS if name in inside), "sae"))
    assemble.require(kind == "sae", where, f"it is a {kind}; only an sae can be read.")
    source, target = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    assemble.require(
        target in (None, source) and settings.is_off(config.get("affine_connection")),
        where,
        f"it is a transcoder: it reads {source} and predicts {target}.",
    )
    architecture = config.get("architecture", "jump_relu")
    assemble.require(
        architecture == "jump_relu", where, f"its architecture is {architecture!r}; only jump_relu can be read."
    )
    weights = directory / "params.safetensors"
    tensors = assemble.take_tensors(files.read_safetensors(weights), _TENSORS, weights)
    assemble.require_sizes(config, {"width": assemble.shape_of(tensors, weights)["d_sae"]}, where)
    return assemble.dictionary(
        where if where.is_file() else weights,
        tensors,
        {"activation": "jumprelu", "pre_bias": False},
        peer=NAME,
        kind="jumprelu",
        hook_point=_place(source) or _place_in(inside),
        model=_model(config, inside),
        config=original,
    )


def _place(source: object) -> str | None:
    found = re.fullmatch(r"(?:[\w.]+\.)?layers\.(\d+)\.(.+)", source) if isinstance(source, str) else None
    hook = next((name for pattern, name in _PLACES.items() if found and re.fullmatch(pattern, found[2])), None)
    return f"blocks.{found[1]}.{hook}" if found and hook else None


def _place_in(inside: str) -> str | None:
    layer = re.search(r"/layer_(\d+)_", inside)
    hook = next((hook for site, hook in _SITES.items() if f"/{site}" in inside), None)
    return f"blocks.{layer[1]}.{hook}" if layer and hook else None


def _model(config: Mapping[str, Any], inside: str) -> str | None:
    """The model's hub id: config.json writes gemma-v3 or leaves out the owner in some releases."""
    found = re.search(r"gemma-scope-2-(\w+)-(pt|it)\b", inside)
    name = assemble.first_text(config, "model_name") or (f"gemma-3-{found[1]}-{found[2]}" if found else None)
    if name is None or "gemma" not in name:
        return name
    name = name.replace("gemma-v3", "gemma-3")
    name = name.removesuffix("-pt") if "270m" in name else name  # that base model's id has no suffix
    return name if "/" in name else f"google/{name}"
