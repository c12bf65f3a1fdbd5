"""What every file format of the store shares: version, number formats, checksums, JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from store import common
from store.common import StoreError, write_bytes

FORMAT_VERSION = 1

# Logical dtype → the numpy dtype on disk. Zarr has no bfloat16, so its bits travel as uint16.
STORED_DTYPE: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
}
# The float32 value of each float16, indexed by its bits: several times faster than numpy's conversion in software.
_WIDENED = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype on disk of a logical dtype. Raises: StoreError if the name is unknown."""
    if dtype not in STORED_DTYPE:
        raise StoreError(f"unknown dtype {dtype!r}: use one of {', '.join(STORED_DTYPE)}")
    return STORED_DTYPE[dtype]


def encode(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floats as the array that is stored for a logical dtype; same shape, C order.

    Rounds to nearest, ties to even; a value beyond the format's range becomes inf. A uint16 array is taken for bfloat16
    bits and returned as it is. Raises: StoreError for any other integer input.
    """
    target = stored_dtype(dtype)
    array = np.asarray(array)
    if dtype == "bfloat16" and array.dtype == np.uint16:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise StoreError(
            f"cannot store {array.dtype} as {dtype}: expected a float array"
            + (" or uint16 holding bfloat16 bits" if dtype == "bfloat16" else "")
        )
    if dtype == "bfloat16":
        return _bfloat16_bits(array)
    with np.errstate(over="ignore"):  # the caller looks for inf and names the row
        return np.ascontiguousarray(array, dtype=target)


def _bfloat16_bits(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(array, dtype=np.float32)
    bits = single.view(np.uint32)
    # Adding half a unit in the last place (one less where the kept part is even) before the cut rounds to nearest
    # even. In a NaN the carry could give another number, so NaNs are treated apart.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(single), np.uint32(0x7FC0), rounded).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """The float32 values of an array made by `encode` with the same `dtype`.

    Written to `out` (float32, C order, same shape) if given, otherwise to a new array.
    """
    if stored.dtype != stored_dtype(dtype):
        raise StoreError(f"expected {stored_dtype(dtype)} on disk for {dtype}, got {stored.dtype}")
    values = np.empty(stored.shape, np.float32) if out is None else out
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits[...] = stored
        bits <<= 16
    elif dtype == "float16":
        np.take(_WIDENED, stored.view(np.uint16), out=values, mode="clip")  # no index is out of bounds
    else:
        values[...] = stored
    return values


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C (Castagnoli) of bytes, or of the memory of an array's elements in C order."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return int(google_crc32c.value(data))


def json_bytes(obj: Any, where: object) -> bytes:
    """`obj` as a JSON file's bytes; equal objects give equal bytes.

    Raises: StoreError naming `where` if `obj` is not JSON; NaN and infinity are not.
    """
    try:
        return common.json_bytes(obj, indent=1)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{where}: cannot be written as JSON: {error}") from error


def atomic_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `json_bytes` whole or not at all. Raises: StoreError if `obj` is not JSON."""
    write_bytes(path, json_bytes(obj, path))


def parse_json(raw: bytes, where: object) -> Any:
    """The object in a JSON file's bytes. Raises: StoreError naming `where` if they are not JSON."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: cannot be read as JSON ({error})") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The object in a JSON file. Raises: StoreError if it is missing or not JSON."""
    try:
        return parse_json(Path(path).read_bytes(), path)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no such file") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
