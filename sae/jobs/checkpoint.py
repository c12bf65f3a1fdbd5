"""Safetensors files written whole or not at all: tensors, with JSON in the header."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from store.common import PARTIAL_SUFFIX, atomic_write


class CheckpointError(ValueError):
    """A checkpoint is missing or damaged."""


def write_tensors(path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes `tensors` and the JSON `header` to `path`, whole or not at all (`store.common.atomic_write`)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A directory has one writer, so unfinished files belong to a killed one: delete them (version 0.1 named them .tmp).
    for stale in (*path.parent.glob(f"{path.name}.*{PARTIAL_SUFFIX}"), *path.parent.glob(f".{path.name}.*.tmp")):
        stale.unlink(missing_ok=True)
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        save_file(plain, str(partial), metadata={"json": json.dumps(header, sort_keys=True)})
        partial.chmod(0o644)  # safetensors creates private files; results are shared


def write_blocks(
    path: str | Path,
    shapes: Mapping[str, Sequence[int]],
    header: Mapping[str, Any],
    blocks: Iterable[tuple[str, int, Tensor]],
) -> None:
    """Writes a safetensors file of float32 tensors from blocks of their rows, holding one block at a time.

    A block is (name, first row, rows); first row −1 means the whole tensor. `W_enc`'s blocks hold its columns as rows.
    """
    path, at = Path(path), 0
    entries: dict[str, dict[str, Any]] = {}
    for name in sorted(shapes):
        size = 4 * math.prod(shapes[name])
        entries[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps({"__metadata__": {"json": json.dumps(dict(header), sort_keys=True)}, **entries}).encode()
    head += b" " * (-len(head) % 8)
    with atomic_write(path) as partial:
        with partial.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + at)
            for name, first, rows in blocks:
                start = 8 + len(head) + entries[name]["data_offsets"][0]
                array = rows.detach().to("cpu", torch.float32).contiguous().numpy()
                if first < 0 or name != "W_enc":
                    file.seek(start + max(0, first) * 4 * math.prod(shapes[name][1:]))
                    file.write(array.tobytes())
                    continue
                for i, column in enumerate(array.T):  # each input's weights, for the features of this block
                    file.seek(start + 4 * (i * shapes[name][1] + first))
                    file.write(column.tobytes())
        partial.chmod(0o644)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and JSON header of a file written by `write_tensors` (or any safetensors file: empty header).

    Raises: CheckpointError when the file is missing or is not a whole safetensors file.
    """
    with opened_tensors(path) as file:
        header = json.loads((file.metadata() or {}).get("json", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


@contextmanager
def opened_tensors(path: str | Path) -> Iterator[Any]:
    """A safetensors file, to read parts of its tensors. Raises: CheckpointError as `read_tensors`, also inside."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: replaced while being opened
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}). Delete it and run the command that made it again."
        ) from error


def read_header(path: str | Path) -> dict[str, Any]:
    """Only the JSON header of a file written by `write_tensors`; {} if there is no such file.

    Raises: CheckpointError when the file is damaged.
    """
    if not Path(path).is_file():
        return {}
    try:
        with safe_open(str(path), "pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {}).get("json", "{}"))
            return header
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}).") from error


def adam_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Adam's state as named tensors: `adam.<parameter>.<exp_avg|exp_avg_sq|step>`."""
    found: dict[str, Tensor] = {}
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"adam.{name}.{key}"] = value.clone()
    return found


def restore_adam(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Restores Adam's state from the tensors of `adam_tensors`."""
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        prefix = f"adam.{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
