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
import time
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
# The float32 value of every float16, by its bits: numpy widens one at a time, in software, several times slower.
_WIDENED = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
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
    elif dtype == "float16":
        np.take(_WIDENED, stored.view(np.uint16), out=values, mode="clip")  # no index is out of bounds
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


def json_bytes(obj: Any, where: object) -> bytes:
    """`obj` as a JSON file's bytes: keys sorted, nothing depends on the time, so equal objects give equal bytes.

    Raises StoreError naming `where` if `obj` is not JSON: NaN and infinity are not.
    """
    try:
        return (json.dumps(obj, sort_keys=True, allow_nan=False, indent=1) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"{where}: cannot be written as JSON: {error}") from error


def atomic_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one and nothing between."""
    path = Path(path)
    # Two processes or threads that write the same file must not share a temporary one.
    unique = f"{os.getpid()}-{threading.get_ident()}"
    partial = path.with_name(f"{path.name}.{unique}{PARTIAL_SUFFIX}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def atomic_json(path: str | os.PathLike[str], obj: Any) -> None:
    """`json_bytes` written by `atomic_bytes`; raises StoreError if `obj` is not JSON."""
    atomic_bytes(path, json_bytes(obj, path))


def parse_json(raw: bytes, where: object) -> Any:
    """The object in a JSON file's bytes; StoreError naming `where` if they are not JSON."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: cannot be read as JSON ({error})") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The object in a JSON file; StoreError if it is missing or is not JSON."""
    try:
        return parse_json(Path(path).read_bytes(), path)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no such file") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error


@contextlib.contextmanager
def exclusive_lock(path: Path, what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, or raise StoreError after `wait_s` saying who is writing `what`.

    The lock is the kernel's (flock): it goes with its process however that ends, so a lock file
    that lies about means nothing. It is removed on the way out.
    """
    deadline = time.monotonic() + wait_s
    while (handle := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise StoreError(
                f"{what} is being written by {_holder(path) or 'another process'}: "
                "wait for it to end, or stop it, then repeat the command"
            )
        time.sleep(0.02)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{writer_name()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)  # frees the lock


def _try_lock(path: Path) -> int | None:
    """An open, locked handle of the file that is at `path` now; None if another process has it."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # its directory was just removed: make it anew
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    return handle
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # the holder before removed this file between our two steps


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_bytes()[:200].decode("utf-8", "replace").strip()
    return ""


def writer_name() -> str:
    """This process as messages name it."""
    return f"pid {os.getpid()} on {socket.gethostname()}"
