"""OpenAI's dictionaries (openai/sparse_autoencoder): one `.pt` file with everything in it, and no configuration."""

from __future__ import annotations

from pathlib import Path

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files

NAME = "openai"
FILES = "one .pt file with pre_bias and latent_bias"

_TENSORS = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def detect(path: Path) -> bool:
    """A .pt file without a configuration beside it: only reading tells more."""
    return path.is_file() and path.suffix == ".pt" and not path.with_name(f"{path.stem}_cfg.json").is_file()


def read(path: Path) -> SAE:
    """The dictionary of one file. It does not say which model or hook point it belongs to.

    Raises: InteropError when it is damaged, or its TopK kind, which normalises every token's activations by itself.
    """
    held = files.read_pt(path)
    activation = held.get("activation", "ReLU")
    assemble.refuse_unless(
        activation != "TopK",
        path,
        "its TopK dictionaries normalise every token's activations by their own mean and deviation; ours takes them as "
        "they are.",
    )
    assemble.refuse_unless(activation == "ReLU", path, f"its activation is {activation!r}; read is ReLU.")
    tensors = assemble.pick(held, _TENSORS, path, ignored=(*_STATISTICS, "activation", "activation_state_dict"))
    assemble.transpose(tensors, ("W_enc", "W_dec"), path)
    return assemble.assemble(
        path, tensors, {"activation": "relu"}, peer=NAME, kind="relu", hook_point=None, model=None, config={}
    )
