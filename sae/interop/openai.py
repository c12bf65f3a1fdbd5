"""OpenAI's dictionaries (openai/sparse_autoencoder): one `.pt` file, without a configuration.

Those with a TopK normalise each row by its own mean and deviation; the file does not say it, its activation does.
Source: openai/sparse_autoencoder, `model.py` (`Autoencoder.from_state_dict`, `LN`).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files, goodfire, qwen_scope, settings

NAME = "openai"
FILES = "one .pt file with pre_bias and latent_bias"

_TENSORS = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
_ACTIVATIONS = {"ReLU": "relu", "TopK": "topk"}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def detect(path: Path) -> bool:
    """A .pt file without a configuration next to it, unless it is one of the others; reading it tells more."""
    alone = path.is_file() and files.only_pt(path) is not None
    return alone and not goodfire.detect(path) and not qwen_scope.detect(path)


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of one file. The file names neither the model nor the hook point.

    Raises: InteropError when it is damaged, or of another activation than ReLU and TopK.
    """
    held = files.read_pt(path)
    activation = str(held.get("activation", "ReLU"))
    how = held.get("activation_state_dict")
    how = how if isinstance(how, dict) else {}
    assemble.require(activation in _ACTIVATIONS, path, f"its activation is {activation!r}; known are ReLU and TopK.")
    settings.refuse_unknown(how, ("k", "postact_fn"), path)
    assemble.require(
        how.get("postact_fn", "ReLU") == "ReLU",
        path,
        f"after the k largest it applies {how.get('postact_fn')!r}, not ReLU.",
    )
    tensors = assemble.take_tensors(held, _TENSORS, path, ignored=(*_STATISTICS, "activation", "activation_state_dict"))
    assemble.transpose(tensors, ("W_enc", "W_dec"), path)
    topk = activation == "TopK"
    return assemble.dictionary(
        path,
        tensors,
        {
            "activation": _ACTIVATIONS[activation],
            "k": assemble.positive_int(how, "k", path) if topk else None,
            "row_norm": "layer_norm" if topk else None,
        },
        peer=NAME,
        kind=_ACTIVATIONS[activation],
        hook_point=None,
        model=None,
        config={},
        notes=["each row is normalised by its own mean and deviation (row_norm = layer_norm)"] if topk else [],
    )
