"""Dictionaries of models that TransformerLens processed on loading, seen from the model's own activations.

`center_writing_weights` subtracts the mean over d_model from everything that is written to the residual stream of a
model with LayerNorm; for a model with RMSNorm TransformerLens leaves it out. The other kinds of processing change only
the hook points listed here.
Source: TransformerLens, `HookedTransformer.from_pretrained` and `HookedTransformer.load_and_process_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.interop import assemble, settings

_CENTRED = re.compile(
    r"hook_(pos_)?embed|blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_(attn|mlp)_(in|out)|attn\.hook_result)"
)
_NOT_CENTRED = re.compile(
    r"blocks\.\d+\.(mlp\.hook_(pre|post)|attn\.hook_(rot_)?[qkvz]|ln\d(_post)?\.hook_normalized)|ln_final\.hook_normalized"
)
_CHANGED_BY = {  # other processing → the hook points at which it changes activations
    "fold_ln": re.compile(r".*hook_normalized"),
    "fold_value_biases": re.compile(r".*attn\.hook_(v|z|result)"),
    "refactor_factored_attn_matrices": re.compile(r".*attn\.hook_(rot_)?([qkvz]|result)"),
}
_HARMLESS = settings.names("""
    attn_implementation cache_dir center_unembed default_padding_side default_prepend_bos device device_map dtype
    first_n_layers local_files_only low_cpu_mem_usage move_to_device n_ctx n_devices token tokenizer torch_dtype
    trust_remote_code
""")
# Families by the start of the model's name without its owner; the longest that fits decides.
_LAYER_NORM = settings.names("""
    attn-only bloom distilgpt2 gelu gpt-j gpt-neo gpt2 gpt_neo opt othello-gpt phi pythia redwood santacoder solu
    stablelm stanford-gpt2 tiny-stories tinystories
""")
_RMS_NORM = settings.names("""
    apertus baichuan codellama deepseek gemma glm granite internlm llama meta-llama ministral mistral mixtral nemotron
    olmo-2 olmo2 olmo-3 phi-3 phi-4 phi3 phi4 qwen smollm tinyllama yi-
""")
_WIDTHS = {  # d_model of models with LayerNorm whose dictionaries SAELens trained before version 3.20
    "gpt2": 768,
    "gpt2-small": 768,
    "distilgpt2": 768,
    "gpt2-medium": 1024,
    "gpt2-large": 1280,
    "gpt2-xl": 1600,
    "pythia-70m": 512,
    "pythia-160m": 768,
    "pythia-410m": 1024,
    "pythia-1b": 2048,
    "pythia-1.4b": 2048,
    "pythia-2.8b": 2560,
    "gelu-1l": 512,
    "gelu-2l": 512,
    "gelu-3l": 512,
    "gelu-4l": 512,
    "solu-1l": 512,
    "attn-only-1l": 512,
    "othello-gpt": 512,
    "tiny-stories-1l-21m": 1024,
    "tiny-stories-1m": 64,
    "tiny-stories-33m": 768,
    "gpt-neo-125m": 768,
    "opt-125m": 768,
}


def _short(model: str | None) -> str:
    return (model or "").lower().rpartition("/")[2]


def known_layer_norm(model: str | None) -> bool | None:
    """Whether a model's norms are LayerNorm (not RMSNorm), by its name; None for an unknown family."""
    fitting = [stem for stem in _LAYER_NORM | _RMS_NORM if _short(model).startswith(stem)]
    return max(fitting, key=len) in _LAYER_NORM if fitting else None


def width_of(model: str | None) -> int | None:
    """d_model of a known model with LayerNorm."""
    return _WIDTHS.get(_short(model).removesuffix("-v0").removesuffix("-deduped"))


def refuse_processed(processing: Mapping[str, Any], place: str | None, model: str | None, where: Path) -> bool:
    """Whether activations were centred at the hook point `place`, by arguments of TransformerLens' `from_pretrained`.

    Raises: InteropError for other processing that changes the activations there, or if the answer is not known.
    """
    settings.refuse_unknown(processing, {"center_writing_weights", *_CHANGED_BY, *_HARMLESS}, where)
    for name, changed in _CHANGED_BY.items():
        assemble.require(
            settings.is_off(processing.get(name)) or place is None or changed.fullmatch(place) is None,
            where,
            f"it was trained on a model that TransformerLens changed on loading ({name}), which changes activations at "
            f"{place}; ours are the model's own. If they are the same for this model: --ignore {name}.",
        )
    if settings.is_off(processing.get("center_writing_weights")) or _NOT_CENTRED.fullmatch(place or ""):
        return False
    layer_norm = known_layer_norm(model)
    assemble.require(
        layer_norm is not None and (layer_norm is False or _CENTRED.fullmatch(place or "") is not None),
        where,
        "it was trained on activations without their mean over d_in (center_writing_weights) if the model has "
        f"LayerNorm, and whether {model or 'its unnamed model'} has one at {place or 'an unnamed hook point'} is not "
        "known here. If it has RMSNorm, or the rows have no mean: --ignore center_writing_weights.",
    )
    return bool(layer_norm)


def fold_centring(tensors: dict[str, Tensor], *, pre_bias: bool) -> str:
    """Makes an encoder of centred rows read rows with their mean; returns a note. x̂ needs `row_norm = "mean"`.

    With P = I − 11ᵀ/d, `(xP − b_dec) W_enc = (x − b_dec) P W_enc − mean(b_dec) · 1ᵀ W_enc`.
    """
    W_enc, b_dec = tensors["W_enc"].double(), tensors["b_dec"].double()
    if pre_bias:
        assemble.shift_encoder(tensors, -b_dec.mean() * W_enc.sum(0))
    tensors["W_enc"] = (W_enc - W_enc.mean(0, keepdim=True)).float()
    return (
        "it reads rows without their mean over d_in (center_writing_weights): folded into the encoder, and the mean is "
        "added to x̂ again (row_norm = mean)"
    )
