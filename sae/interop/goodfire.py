"""Goodfire's dictionaries (Llama 3, DeepSeek R1): one `.pt` or `.pth` file named `<model>-SAE-l<layer>`.

ReLU without a pre-bias: `f = ReLU(x W_enc + b_enc)`, `x̂ = f W_dec + b_dec`, at the residual stream after the layer.
Source: the repositories' README and notebook (Goodfire/Llama-3.3-70B-Instruct-SAE-l50); SAELens'
`get_goodfire_huggingface_loader`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files

NAME = "goodfire"
FILES = "one .pt or .pth file with encoder_linear and decoder_linear"

_TENSORS = {
    "W_enc": "encoder_linear.weight",
    "b_enc": "encoder_linear.bias",
    "W_dec": "decoder_linear.weight",
    "b_dec": "decoder_linear.bias",
}
_NAME = re.compile(r"(?P<model>.+)-SAE-l(?P<layer>\d+)")
_OWNERS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}


def detect(path: Path) -> bool:
    file = files.only_pt(path)
    return file is not None and set(_TENSORS.values()) <= files.names_in_pt(file)


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of one file; its name tells model and layer. Raises: InteropError when it is damaged."""
    file = files.only_pt(path) or path
    tensors = assemble.take_tensors(files.read_pt(file), _TENSORS, file)
    assemble.transpose(tensors, ("W_enc", "W_dec"), file)
    named = _NAME.fullmatch(file.stem)
    return assemble.dictionary(
        file,
        tensors,
        {"activation": "relu", "pre_bias": False},
        peer=NAME,
        kind="relu",
        hook_point=f"blocks.{named['layer']}.hook_resid_post" if named else None,
        model=_model(named["model"]) if named else None,
        config={},
    )


def _model(name: str) -> str:
    owner = _OWNERS.get(name.partition("-")[0])
    return f"{owner}/{name}" if owner else name
