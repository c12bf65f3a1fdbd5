"""The identity of a language model: a hash of its parameters and of the settings that decide what they compute.

Its files do not count: a directory, a copy of it, a shipped name and a hub id of the same weights are one model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch


def sha256_of_model(parameters: str, settings: Mapping[str, Any]) -> str:
    """Hash of the parameters' hash and of the settings that decide activations: heads, activation function, norm …"""
    return sha256(json.dumps([parameters, dict(settings)], sort_keys=True).encode()).hexdigest()


def sha256_of_parameters(module: torch.nn.Module) -> str:
    """Hash of every parameter's name and values, in the precision in which they are loaded."""
    digest = sha256()
    for name, parameter in sorted(module.state_dict().items()):
        raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(name.encode())
        digest.update(raw)
    return digest.hexdigest()
