"""What a language model is known by: a hash of its parameters and of the settings they are computed with.

Not of its files: the same model as a directory, a copy of it, a shipped name or a hub id is one model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
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
