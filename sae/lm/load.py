"""Finds a model by its name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from sae.lm.base import LanguageModel, ModelError, read_json_file
from sae.lm.bridge import LEGACY_HUB_IDS, open_directory, open_hub
from sae.lm.native import NativeModel


def load_model(name: str | Path, *, device: str = "cpu") -> LanguageModel:
    """Opens an existing directory, else a shipped model, else a model of the Hugging Face hub.

    Raises: ModelError if none is found; the message lists the shipped models.
    """
    path = Path(name)
    if path.is_dir():
        native = read_json_file(path / "config.json").get("kind") == NativeModel.kind
        return (NativeModel if native else open_directory)(path, str(name), device)
    shipped = shipped_models()
    if str(name) in shipped:
        return NativeModel(shipped[str(name)], str(name), device)
    if str(name) not in LEGACY_HUB_IDS and str(name).count("/") != 1:
        raise ModelError(
            f"model {str(name)!r}: no such directory, and no shipped model has this name "
            f"(shipped: {', '.join(sorted(shipped)) or 'none'}). Models of the hub are named owner/name."
        )
    return open_hub(str(name), device)


def shipped_models() -> dict[str, Path]:
    """Names and directories of the models that are part of the package."""
    root = Path(str(files("sae.lm"))) / "shipped"
    return {p.parent.name: p.parent for p in sorted(root.glob("*/model.safetensors"))}
