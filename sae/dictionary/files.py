"""A dictionary on disk: `sae.safetensors` and `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.dictionary.autoencoder import SAE, SHAPE, WHOLE
from sae.jobs.checkpoint import CheckpointError, opened_tensors, read_tensors, write_tensors
from store.common import write_json

FORMAT = 2  # of a dictionary with a row_norm, which version 0.1 would ignore; all others are format 1


def save(sae: SAE, directory: str | Path, config: Mapping[str, Any]) -> Path:
    """Writes `sae.safetensors` and then `config.json` (kind, format, shape, and what `config` adds)."""
    directory = Path(directory)
    shape = {name: value for name, value in sae.shape.items() if name != "row_norm" or value is not None}
    write_tensors(directory / "sae.safetensors", sae.tensors(), _head(shape))
    write_config(shape, directory, config)
    return directory


def write_config(shape: Mapping[str, Any], directory: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json`: the shape of the dictionary, and what `config` adds."""
    rest = {name: value for name, value in config.items() if name != "row_norm"}
    write_json(directory / "config.json", {**rest, **_head(shape), **shape})


def _head(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "sae", "format": FORMAT if "row_norm" in shape else 1}


def load(path: str | Path, features: range | None = None) -> SAE:
    """Opens a dictionary written by `save` (or `sae train`).

    With `features` only these are read, of a dictionary that does not fit into memory. The weights are those of the
    whole; of the features that topk would choose, those of this part alone compete.
    Raises: CheckpointError if the directory holds no dictionary, a newer format, or tensors that do not fit its config.
    """
    directory = Path(path)
    config = read_config(directory)
    missing = [key for key in ("d_in", "d_sae", "activation") if key not in config]
    if missing:
        raise CheckpointError(f"{directory}/config.json lacks {', '.join(missing)}; train or export it again.")
    shape = {name: config[name] for name in SHAPE if name in config}
    if features is not None:
        shape |= _shape_of_part(directory, config, features)
    sae = SAE(**shape)
    tensors = _tensors(directory / "sae.safetensors", features)
    expected = {name: tuple(t.shape) for name, t in sae.tensors().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        raise CheckpointError(
            f"{directory}/sae.safetensors does not fit config.json: expected {expected}, got {found}."
        )
    sae.load_state_dict(tensors)
    sae.config = config
    return sae.eval().requires_grad_(False)


def _shape_of_part(directory: Path, config: Mapping[str, Any], features: range) -> dict[str, Any]:
    """What differs in the shape of a part. Raises: ValueError for features that the dictionary does not have."""
    d_sae = config["d_sae"]
    if features.step != 1 or not 0 <= features.start < features.stop <= d_sae:
        raise ValueError(f"{directory} has the features 0 to {d_sae - 1:,}; got {features}. Choose a range of these.")
    k = config.get("k")
    return {"d_sae": len(features), "k": min(k, len(features)) if k else k}


def _tensors(path: Path, features: range | None) -> dict[str, Tensor]:
    """The tensors of a dictionary, or of some of its features; of a part, only its bytes are read."""
    if features is None:
        return read_tensors(path)[0]
    part, found = slice(features.start, features.stop), {}
    with opened_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            rows = file.get_slice(name)
            found[name] = rows[:] if name in WHOLE else rows[:, part] if name == "W_enc" else rows[part]
    return found


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a dictionary. Raises: CheckpointError naming what was found instead."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a dictionary: it has no config.json. `sae train` makes one.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("kind") != "sae":
        raise CheckpointError(
            f'{path}: expected "kind": "sae", got {config.get("kind") if isinstance(config, dict) else config!r}.'
        )
    if config.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path} has format {config['format']}; this version reads up to {FORMAT}. Update monosem."
        )
    return config
