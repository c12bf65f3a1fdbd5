"""Where things lie in an `acts.zarr`, and how an empty one comes into being."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from store.schema import (
    FORMAT_VERSION,
    StoreError,
    fsync_directory,
    fsync_file,
    read_json,
    stored_dtype,
)
from store.shards import ShardedArray

SPLITS = ("heldout", "train")  # in the order of their shards
LANES = 64  # shard s of a split belongs to lane s % LANES, whatever the number of workers
KIND = "activations"
TEXT_ARRAYS: dict[str, tuple[type, int | bool]] = {  # name: dtype, what padding holds
    "tokens": (np.uint32, 0),
    "keep": (np.bool_, False),
    "document": (np.int32, -1),
}


def acts_name(hook_point: str) -> str:
    """Path of a hook point's array under the store."""
    return f"hooks/{hook_point}/acts"


def lock_file(path: Path) -> Path:
    """The writer's lock of a store, beside it."""
    return Path(os.path.realpath(path) + ".lock")


def is_vacant(path: Path) -> bool:
    """Whether a store may be made here: nothing is there, or an empty directory."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def read_attributes(path: Path) -> dict[str, Any]:
    """The settings of the store at `path`; StoreError if it is none or too new, or damaged."""
    if not (path / "zarr.json").is_file():
        raise StoreError(f"{path} is not an activation store: it has no zarr.json")
    metadata = read_json(path / "zarr.json")
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(attributes, dict) or attributes.get("kind") != KIND:
        raise StoreError(f"{path} is not an activation store: its zarr.json describes another kind")
    if attributes["format"] > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format {attributes['format']}, this version reads up to {FORMAT_VERSION}: update monosem"
        )
    for name in (*map(acts_name, attributes["hook_points"]), *TEXT_ARRAYS):
        if not (path / name / "zarr.json").is_file():
            raise StoreError(
                f"{path} is damaged: {name}/zarr.json is missing. "
                "Copy it again from where it came, or harvest again under another name."
            )
    return attributes


def build(target: Path, attributes: dict[str, Any]) -> None:
    """Make the store beside its place and rename it there: killed before, it does not exist."""
    draft = target.with_name(target.name + ".creating")
    if draft.exists():
        shutil.rmtree(draft)
    group = zarr.create_group(str(draft), attributes=attributes)
    n_shards = sum(attributes["n_shards"].values())
    contexts, seq_len = attributes["contexts_per_shard"], attributes["seq_len"]
    for hook, d_in in attributes["hook_points"].items():
        dtype = attributes["dtype"][hook]
        ShardedArray.create(
            group,
            acts_name(hook),
            n_shards=n_shards,
            shard_shape=(contexts * seq_len, d_in),
            dtype=stored_dtype(dtype),
            fill=0,
            attributes={"logical_dtype": dtype},
        )
    for name, (kind, fill) in TEXT_ARRAYS.items():
        ShardedArray.create(
            group,
            name,
            n_shards=n_shards,
            shard_shape=(contexts, seq_len),
            dtype=np.dtype(kind),
            fill=fill,
            attributes={},
        )
    for split in SPLITS:
        (draft / "markers" / split).mkdir(parents=True)
    for entry in [*draft.rglob("*"), draft]:
        if entry.is_dir():
            fsync_directory(entry)
        else:
            fsync_file(entry)
    os.rename(draft, target)
    fsync_directory(target.parent)
