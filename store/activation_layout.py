"""The layout of an `acts.zarr`: its keys, its settings, and the files of an empty one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from store.common import HELD_OUT, SPLITS, TRAIN, StoreError
from store.places import Place
from store.schema import FORMAT_VERSION, parse_json, stored_dtype

KIND = "activations"
TEXT_ARRAYS: dict[str, tuple[type, int | bool]] = {  # name: dtype, what padding holds
    "tokens": (np.uint32, 0),
    "keep": (np.bool_, False),
    "document": (np.int32, -1),
}
METADATA = "zarr.json"
COMPLETE = "complete.json"
VOCABULARY = "vocabulary.json"  # of rows that came as arrays: what each token id stands for
_FILE_OF_SHARD = re.compile(r"(?:.*/)?c/(\d+)/[^/]*")
_FILE_OF_MARKER = re.compile(r"markers/(heldout|train)/(\d+)\.json[^/]*")


def acts_name(hook_point: str) -> str:
    """The key of a hook point's array."""
    return f"hooks/{hook_point}/acts"


def array_names(attributes: dict[str, Any]) -> list[str]:
    """All arrays of a store: one for each hook point, then those of the text."""
    return [acts_name(hook) for hook in attributes["hook_points"]] + list(TEXT_ARRAYS)


def marker_key(split: str, shard: int) -> str:
    """The key of a shard's marker."""
    return f"markers/{split}/{shard:08d}.json"


def shard_of_key(key: str, n_heldout: int) -> tuple[str, int] | None:
    """The (split, shard) that a file, finished or not, belongs to; None for files of the whole store."""
    if found := _FILE_OF_MARKER.fullmatch(key):
        return found[1], int(found[2])
    if found := _FILE_OF_SHARD.fullmatch(key):
        number = int(found[1])
        return (HELD_OUT, number) if number < n_heldout else (TRAIN, number - n_heldout)
    return None


def parse_attributes(raw: bytes, where: object) -> dict[str, Any]:
    """The settings in a store's zarr.json. Raises: StoreError if it is of another kind, too new or damaged."""
    metadata = parse_json(raw, where)
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(attributes, dict) or attributes.get("kind") != KIND:
        raise StoreError(f"{where} does not describe an activation store")
    version = attributes.get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreError(f"{where} has format {version}, this version reads up to {FORMAT_VERSION}: update monosem")
    wrong = sorted(name for name, holds in _ATTRIBUTES.items() if not holds(attributes.get(name)))
    if not wrong and set(attributes["dtype"]) != set(attributes["hook_points"]):
        wrong = ["dtype"]
    if not wrong and not 0 < _row_count(attributes) < _MOST_ROWS:
        wrong = ["n_shards"]
    if wrong:
        raise StoreError(f"{where} is damaged: {', '.join(wrong)} wrong or missing. {REPAIR_METADATA}")
    for dtype in attributes["dtype"].values():
        stored_dtype(dtype)
    return attributes


REPAIR_METADATA = "Copy it from its source again, or harvest again under another name."


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


HOOK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")  # becomes the name of a directory
_MOST_ROWS = 1 << 62  # rows are numbered in int64


def _row_count(attributes: dict[str, Any]) -> int:
    return int(attributes["seq_len"] * attributes["contexts_per_shard"] * sum(attributes["n_shards"].values()))


_ATTRIBUTES: dict[str, Callable[[Any], bool]] = {
    "format": lambda v: _count(v, 1),
    "seq_len": lambda v: _count(v, 1),
    "contexts_per_shard": lambda v: _count(v, 1),
    "hook_points": lambda v: (
        isinstance(v, dict)
        and bool(v)
        and all(_count(d, 1) and d < _MOST_ROWS and HOOK_NAME.fullmatch(hook) for hook, d in v.items())
    ),
    "dtype": lambda v: isinstance(v, dict) and all(isinstance(d, str) for d in v.values()),
    "n_shards": lambda v: isinstance(v, dict) and set(v) == set(SPLITS) and all(_count(n, 0) for n in v.values()),
    "provenance": lambda v: isinstance(v, dict),
    "text_lanes": lambda v: (  # recorded only where a split has another number than 64
        v is None or (isinstance(v, dict) and set(v) == set(SPLITS) and all(_count(n, 1) for n in v.values()))
    ),
}


def read_attributes(place: Place) -> dict[str, Any]:
    """The settings of the store at `place`. Raises: StoreError if there is no store, or it is too new or damaged."""
    if place.size(METADATA) is None:
        raise StoreError(f"{place.path} is not an activation store: it has no zarr.json")
    attributes = parse_attributes(place.read(METADATA), place.where(METADATA))
    for name in array_names(attributes):
        if place.size(f"{name}/{METADATA}") is None:
            raise StoreError(
                f"{place.path} is damaged: {name}/zarr.json is missing. `sae verify --repair` writes it again."
            )
    return attributes


_DECISIVE = ("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "codecs", "fill_value")


def metadata_problems(place: Place, attributes: dict[str, Any]) -> dict[str, str]:
    """What is wrong with the arrays' zarr.json files, by key: missing, damaged, or not as the settings require."""
    found = {}
    for key, content in metadata_files(attributes).items():
        if key == METADATA:
            continue
        expected = parse_json(content, key)
        try:
            there = parse_json(place.read(key), place.where(key))
            same = isinstance(there, dict) and all(there.get(k) == expected.get(k) for k in _DECISIVE)
            said = "" if same else f"{place.where(key)}: damaged: it does not follow from the store's settings"
        except StoreError as error:
            said = str(error)
        if said:
            found[key] = f"{said}; `sae verify --repair` writes it again"
    return found


def metadata_files(attributes: dict[str, Any]) -> dict[str, bytes]:
    """The zarr.json files of an empty store. The last one is the store's own: without it there is no store."""
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes=attributes)
    n_shards = sum(attributes["n_shards"].values())
    contexts, seq_len = attributes["contexts_per_shard"], attributes["seq_len"]
    for hook, d_in in attributes["hook_points"].items():
        dtype = attributes["dtype"][hook]
        _create_array(
            group,
            acts_name(hook),
            n_shards=n_shards,
            shard_shape=(contexts * seq_len, d_in),
            dtype=stored_dtype(dtype),
            fill=0,
            attributes={"logical_dtype": dtype},
        )
    for name, (kind, fill) in TEXT_ARRAYS.items():
        _create_array(
            group,
            name,
            n_shards=n_shards,
            shard_shape=(contexts, seq_len),
            dtype=np.dtype(kind),
            fill=fill,
            attributes={},
        )
    ordered = sorted(files, key=lambda key: (key == METADATA, key))
    return {key: files[key].to_bytes() for key in ordered}


def _create_array(
    group: zarr.Group,
    name: str,
    *,
    n_shards: int,
    shard_shape: tuple[int, int],
    dtype: np.dtype[Any],
    fill: int | bool,
    attributes: dict[str, Any],
) -> None:
    """Creates an array's metadata for shards of shape [length, width], without data."""
    group.create_array(
        name,
        shape=(n_shards * shard_shape[0], shard_shape[1]),
        chunks=shard_shape,
        dtype=dtype,
        fill_value=fill,
        filters=None,
        compressors=[Crc32cCodec()],
        attributes=attributes,
    )
