"""What a language model is known by: a hash of its parameters and of the settings they are computed with.

Not of its files: the same model as a directory, a copy of it, a shipped name or a hub id is one model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch


def sha256_of_model(parameters: str, settings: Mapping[str, Any]) -> str:
    """Of the parameters' hash and of what else decides the activations (heads, activation function, norm …)."""
    return sha256(json.dumps([parameters, dict(settings)], sort_keys=True).encode()).hexdigest()


def sha256_of_parameters(module: torch.nn.Module) -> str:
    """Of every parameter's name and values, as they are loaded."""
    digest = sha256()
    for name, parameter in sorted(module.state_dict().items()):
        raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(name.encode())
        digest.update(raw)
    return digest.hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """Of the files' bytes, one after another."""
    digest = sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two recorded identities are of one model; the first versions recorded what is now the older hash."""
    if "older_sha256" in a and "older_sha256" in b:
        return bool(a["sha256"]) and a["sha256"] == b["sha256"]
    return bool(_hashes(a) & _hashes(b))


def _hashes(identity: Mapping[str, Any]) -> set[str]:
    return {identity[key] for key in ("sha256", "older_sha256") if identity.get(key)}
