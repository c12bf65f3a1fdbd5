"""Translates peers' names of hook points into TransformerLens' names."""

from __future__ import annotations

import re

_BLOCK = r"(?:[\w.]+\.)?(?:layers|blocks|h)\.(\d+)"
_PLACES = (  # modules of Hugging Face models and dictionary_learning's names → what TransformerLens calls their output
    (rf"{_BLOCK}", "blocks.{}.hook_resid_post"),
    (rf"{_BLOCK}\.mlp", "blocks.{}.hook_mlp_out"),
    (rf"{_BLOCK}\.mlp\.act(?:_fn)?", "blocks.{}.mlp.hook_post"),
    (rf"{_BLOCK}\.(?:attn|self_attn|attention)", "blocks.{}.hook_attn_out"),
    (r"(?:[\w.]+\.)?(?:wte|embed_in|embed_tokens)", "hook_embed"),
    (r"(?:resid|resid_post|resid_out)_layer_?(\d+)", "blocks.{}.hook_resid_post"),
    (r"resid_pre_layer_?(\d+)", "blocks.{}.hook_resid_pre"),
    (r"mlp_out_layer_?(\d+)", "blocks.{}.hook_mlp_out"),
    (r"attn_out_layer_?(\d+)", "blocks.{}.hook_attn_out"),
)
_SHORT = {  # TransformerLens' own short names of a block's activations
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "post": "mlp.hook_post",
    "pre": "mlp.hook_pre",
    "mlp_post": "mlp.hook_post",
    "mlp_pre": "mlp.hook_pre",
    **{name: f"attn.hook_{name}" for name in "qkvz"},
}
_TRANSFORMER_LENS = re.compile(r"(?:(?:blocks\.\d+|ln_final)\.(?:[\w.]*\.)?)?hook_\w+")


def hook_point(place: str | None) -> str | None:
    """TransformerLens' name of a peer's hook, module path or submodule name; None for an unknown name."""
    if place is None:
        return None
    if _TRANSFORMER_LENS.fullmatch(place):
        return place
    for pattern, name in _PLACES:
        if match := re.fullmatch(pattern, place):
            return name.format(*match.groups())
    return None


def short_hook_point(act: str | None, layer: object) -> str | None:
    """TransformerLens' name of an activation given by its short name and layer, e.g. ("post", 0)."""
    if act in _SHORT and isinstance(layer, int) and not isinstance(layer, bool):
        return f"blocks.{layer}.{_SHORT[act]}"
    return hook_point(act)


def layer_of(hook_point: str | None) -> int | None:
    """The block a hook point is in."""
    match = re.match(r"blocks\.(\d+)\.", hook_point or "")
    return int(match[1]) if match else None
