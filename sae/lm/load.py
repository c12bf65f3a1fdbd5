"""Finds a model by its name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from sae.lm.base import LanguageModel, ModelError, read_json_file
from sae.lm.bridge import LEGACY_HUB_IDS, open_directory, open_hub
from sae.lm.native import NativeModel


def load_model(name: str | Path, *, device: str = "cpu", weights_sha256: str | None = None) -> LanguageModel:
    """Opens an existing directory, else a shipped model, else a model of the Hugging Face hub.

    `weights_sha256`, as a store or a dictionary has recorded it, chooses among the shipped models when the one of that
    name was replaced: the earlier one is still shipped, under another name. Elsewhere the caller compares the weights.
    Raises: ModelError if none is found; the message lists the shipped models.
    """
    path = Path(name)
    if path.is_dir():
        native = read_json_file(path / "config.json").get("kind") == NativeModel.kind
        return (NativeModel if native else open_directory)(path, str(name), device)
    shipped = shipped_models()
    if str(name) in shipped:
        return _shipped_with(weights_sha256, str(name), shipped, device)
    if str(name) not in LEGACY_HUB_IDS and str(name).count("/") != 1:
        raise ModelError(
            f"model {str(name)!r}: no such directory, and no shipped model has this name "
            f"(shipped: {', '.join(sorted(shipped)) or 'none'}). Models of the hub are named owner/name."
        )
    return open_hub(str(name), device)


def _shipped_with(weights_sha256: str | None, name: str, shipped: Mapping[str, Path], device: str) -> LanguageModel:
    """The model of that name, unless another shipped one has the weights and this one has not."""
    model = NativeModel(shipped[name], name, device)
    if weights_sha256 not in (None, model.weights_sha256):
        for other in shipped.keys() - {name}:
            candidate = NativeModel(shipped[other], other, device)
            if candidate.weights_sha256 == weights_sha256:
                return candidate
    return model


def shipped_models() -> dict[str, Path]:
    """Names and directories of the models that are part of the package."""
    root = Path(str(files("sae.lm"))) / "shipped"
    return {p.parent.name: p.parent for p in sorted(root.glob("*/model.safetensors"))}
