"""Foreign files, which may be broken or hostile: read whole or refused with a reason; nothing in them is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.jobs.checkpoint import CheckpointError, read_tensors
from store.common import write_bytes


class InteropError(ValueError):
    """A foreign dictionary is damaged, or means something that ours cannot say."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: InteropError naming the file."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise InteropError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InteropError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Its tensors. Raises: InteropError when the file is not whole."""
    try:
        return read_tensors(path)[0]
    except CheckpointError as error:
        raise InteropError(f"{path} is missing or not a whole safetensors file; download it again.") from error


def read_pt(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: tensors and plain values only; nothing in the file is run.

    Raises: InteropError when the file is not whole, holds code or objects, or is not a dictionary.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a foreign file can raise anything while it is taken apart
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InteropError(
            f"{path} is not a whole file of tensors and plain values, which is all that is read from a .pt file: a "
            f"pickle can carry code, and none is run ({reason})."
        ) from error
    if not isinstance(content, dict):
        raise InteropError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}.")
    return content


def write_pt(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as `torch.save` does, whole or not at all: for peers that read nothing else."""
    held = BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, held)
    write_bytes(path, held.getvalue())
