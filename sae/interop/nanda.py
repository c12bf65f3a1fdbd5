"""Neel Nanda's one-layer dictionaries (gelu-1l and similar models): `25.pt` next to `25_cfg.json`."""

from __future__ import annotations

from pathlib import Path

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files
from sae.interop.files import InteropError
from sae.interop.hooks import short_hook_point

NAME = "nanda"
FILES = "N.pt and N_cfg.json"


def _weights(path: Path) -> list[Path]:
    """The .pt files at `path` (a file or a directory) that have a configuration next to them."""
    found = [path] if path.is_file() else sorted(path.glob("*.pt"))
    return [file for file in found if file.suffix == ".pt" and _config_of(file).is_file()]


def _config_of(weights: Path) -> Path:
    return weights.with_name(f"{weights.stem}_cfg.json")


def detect(path: Path) -> bool:
    return bool(_weights(path))


def read(path: Path) -> SAE:
    """One dictionary: ReLU with a tied pre-bias. Decoder norms stay as they are; in the published runs they are not 1.

    Raises: InteropError when it is damaged, or when the directory holds several dictionaries.
    """
    found = _weights(path)
    if len(found) != 1:
        names = ", ".join(file.name for file in found)
        raise InteropError(f"{path} holds several dictionaries ({names}); give the path of one file.")
    weights = found[0]
    config = files.read_json(_config_of(weights))
    activation = config.get("activation", "relu")
    assemble.require(activation == "relu", weights, f"its activation is {activation!r}; only relu can be read.")
    tensors = assemble.take_tensors(
        files.read_pt(weights), {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}, weights
    )
    return assemble.dictionary(
        weights,
        tensors,
        {"activation": "relu"},
        peer=NAME,
        kind="relu",
        hook_point=short_hook_point(assemble.first_text(config, "act_name", "act") or "post", config.get("layer", 0)),
        model=assemble.first_text(config, "model_name") or "gelu-1l",
        config=config,
    )
