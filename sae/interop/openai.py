"""OpenAI's dictionaries (openai/sparse_autoencoder): one `.pt` file, without a configuration."""

from __future__ import annotations

from pathlib import Path

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files

NAME = "openai"
FILES = "one .pt file with pre_bias and latent_bias"

_TENSORS = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def detect(path: Path) -> bool:
    """A .pt file without a configuration next to it; only reading it shows whether it is one of these."""
    return path.is_file() and path.suffix == ".pt" and not path.with_name(f"{path.stem}_cfg.json").is_file()


def read(path: Path) -> SAE:
    """The dictionary of one file. The file names neither the model nor the hook point.

    Raises: InteropError when it is damaged, or of the TopK kind, which normalises each token's activations separately.
    """
    held = files.read_pt(path)
    activation = held.get("activation", "ReLU")
    assemble.require(
        activation != "TopK",
        path,
        "OpenAI's TopK dictionaries normalise each token's activations by their own mean and deviation; ours takes "
        "them unchanged.",
    )
    assemble.require(activation == "ReLU", path, f"its activation is {activation!r}; only ReLU can be read.")
    tensors = assemble.take_tensors(held, _TENSORS, path, ignored=(*_STATISTICS, "activation", "activation_state_dict"))
    assemble.transpose(tensors, ("W_enc", "W_dec"), path)
    return assemble.dictionary(
        path, tensors, {"activation": "relu"}, peer=NAME, kind="relu", hook_point=None, model=None, config={}
    )
