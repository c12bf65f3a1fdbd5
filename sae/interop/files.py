"""Reads peers' files, which may be damaged or hostile: whole or not at all, and without running any code in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.jobs.checkpoint import CheckpointError, read_tensors
from store.common import write_bytes


class InteropError(ValueError):
    """A peer's file is damaged, or describes a dictionary that ours cannot represent."""


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
    """The tensors of a file. Raises: InteropError when it is missing or incomplete."""
    try:
        return read_tensors(path)[0]
    except CheckpointError as error:
        raise InteropError(f"{path} is missing or not a complete safetensors file; download it again.") from error


def read_pt(path: Path) -> dict[str, Any]:
    """Reads what `torch.save` wrote: tensors and plain values only; no code in the file is run.

    Raises: InteropError when the file is incomplete, holds code or objects, or is not a dictionary.
    """
    try:
        content = _loaded(path)
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a damaged file can raise anything while it is read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InteropError(
            f"{path} is not a complete file of tensors and plain values. Nothing else is read from a .pt file, because "
            f"a pickle can carry code and none is run ({reason})."
        ) from error
    if not isinstance(content, dict):
        raise InteropError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}.")
    return content


def _loaded(path: Path, *, mmap: bool = False) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a `.npz` file as tensors; arrays of objects are pickles and are not read.

    Raises: InteropError when the file is incomplete or holds anything but numbers.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(np.array(archive[name])) for name in archive.files}
    except Exception as error:  # a damaged file can raise anything while it is read
        raise InteropError(f"{path} is not a complete .npz file of numbers ({str(error)[:200]}).") from error


def names_in_pt(path: Path) -> set[str]:
    """The names in a file of `torch.save`, without reading its tensors; none if it cannot be read."""
    try:
        content = _loaded(path, mmap=True)
    except Exception:  # a damaged file, or one of the old layout: the reader says what is wrong
        return set()
    return set(map(str, content)) if isinstance(content, dict) else set()


def only_pt(path: Path) -> Path | None:
    """The file at `path`, or the only one in that directory, if it ends in .pt or .pth and has no configuration."""
    found = [path] if path.is_file() else [each for each in sorted(path.iterdir()) if each.suffix in (".pt", ".pth")]
    alone = len(found) == 1 and found[0].suffix in (".pt", ".pth")
    return found[0] if alone and not found[0].with_name(f"{found[0].stem}_cfg.json").is_file() else None


def write_pt(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as `torch.save` does, for peers that read nothing else; the file appears only when complete."""
    held = BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, held)
    write_bytes(path, held.getvalue())
