"""What every file format of the store shares: version, number formats, checksums, atomic writes.

A writer may be killed at any instruction and the machine may lose power. A file made here is
therefore either the old one or the new one, never a mixture and never empty.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

FORMAT_VERSION = 1

# Logical dtype → the numpy dtype on disk. Zarr has no bfloat16, so its bits travel as uint16.
STORED_DTYPE: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
}
PARTIAL_SUFFIX = ".partial"  # the same that zarr gives its own temporary files


class StoreError(ValueError):
    """Something a person can mend about a store: what, where, got, expected, what to do next."""


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """Numpy dtype that holds the logical `dtype` on disk; StoreError if the name is unknown."""
    if dtype not in STORED_DTYPE:
        raise StoreError(f"unknown dtype {dtype!r}: use one of {', '.join(STORED_DTYPE)}")
    return STORED_DTYPE[dtype]


def encode(array: np.ndarray, dtype: str) -> np.ndarray:
    """Cast floats to the array that is stored for the logical `dtype`; same shape, C order.

    Rounds to nearest, ties to even; a value beyond the format's range becomes inf. A uint16 array
    is taken as bfloat16 bits and passes through. Raises StoreError for any other integer input.
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
    with np.errstate(over="ignore"):  # the caller looks for inf and can name the row
        return np.ascontiguousarray(array, dtype=target)


def _bfloat16_bits(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(array, dtype=np.float32)
    bits = single.view(np.uint32)
    # Adding half a unit in the last place (one less where the kept part is even) makes the cut a
    # rounding to nearest even. A NaN could carry into another number, so NaNs are set apart.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(single), np.uint32(0x7FC0), rounded).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """The float32 values of an array made by `encode` with the same `dtype`.

    Written to `out` (float32, C order, same shape) if given, else to a new array.
    """
    if stored.dtype != stored_dtype(dtype):
        raise StoreError(f"expected {stored_dtype(dtype)} on disk for {dtype}, got {stored.dtype}")
    values = np.empty(stored.shape, np.float32) if out is None else out
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits[...] = stored
        bits <<= 16
    else:
        values[...] = stored
    return values


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C (Castagnoli) of bytes, or of an array's elements in C order as they lie in memory."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return int(google_crc32c.value(data))


def fsync_directory(path: Path) -> None:
    """Make renames, creations and removals inside a directory survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make a file's bytes survive a loss of power (its name needs `fsync_directory`)."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def atomic_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as JSON so that a reader sees the old file or the new one and nothing between.

    Keys are sorted and nothing depends on the time, so equal objects give equal bytes. Raises
    StoreError if `obj` is not JSON: NaN and infinity are not.
    """
    path = Path(path)
    try:
        text = json.dumps(obj, sort_keys=True, allow_nan=False, indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path}: cannot be written as JSON: {error}") from error
    # Two processes or threads that write the same file must not share a temporary one.
    unique = f"{os.getpid()}-{threading.get_ident()}"
    partial = path.with_name(f"{path.name}.{unique}{PARTIAL_SUFFIX}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The object in a JSON file; StoreError if it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read as JSON ({error})") from error


@contextlib.contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, or raise StoreError saying who is writing `what`.

    The lock is the kernel's (flock): it goes with its process however that ends, so a lock file
    that lies about means nothing.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
            raise StoreError(
                f"{what} is being written by {holder or 'another process'}: "
                "wait for it to end, or stop it, then repeat the command"
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)  # frees the lock
