"""Arrays that other programs wrote (.npy, .safetensors, Zarr, Arrow, Parquet), read in slices and never whole.

An array is a sequence of items along its first axis. An item is one row [d_in], or one sample: several rows
[positions, d_in].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from store import arrow_arrays
from store.arrow_arrays import read_parts
from store.common import StoreError

FLOATS = ("float16", "bfloat16", "float32", "float64")
SUFFIXES = (".npy", ".safetensors", ".zarr", *arrow_arrays.SUFFIXES)
READS = "Files that can be read: .npy, .safetensors, .arrow and .parquet, Zarr arrays, and directories of these."
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_ADVICE = {
    ".npz": "An .npz cannot be read in slices: save each array as .npy.",
    ".pt": 'torch.load may run code: save it with safetensors.torch.save_file({"acts": tensor}, "acts.safetensors").',
}
_ADVICE |= {".pth": _ADVICE[".pt"], ".pkl": "A pickle may run code: save the array as .npy.", ".bin": _ADVICE[".pt"]}


@dataclass(frozen=True, eq=False)
class StoredArray:
    """One array: `shape`, `dtype` (numpy's name, or bfloat16, whose bits are read as uint16), and `read(start, stop)`.

    `read` gives the items from `start` to `stop`. Of a ragged array (`lengths`: rows of each sample, shape [samples,
    -1, d_in]) it gives their rows, end to end. A column of texts has dtype `str`.
    """

    where: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], np.ndarray]
    lengths: np.ndarray | None = None

    @property
    def holds_rows(self) -> bool:
        """Whether it can hold activations: floats, with two or three axes."""
        return self.dtype in FLOATS and len(self.shape) in (2, 3)


@dataclass(frozen=True)
class ArraySource:
    """The arrays that a path holds, by name, and the files in it that were not read."""

    path: Path
    arrays: dict[str, StoredArray]
    unread: tuple[str, ...] = ()


class Rows:
    """The rows of an array, numbered through its samples.

    `lengths` holds the number of rows of each sample; None if the array does not say which rows belong together.
    """

    def __init__(self, array: StoredArray) -> None:
        """Raises: StoreError for an array that cannot hold activations."""
        if array.dtype not in FLOATS:
            raise StoreError(f"{array.where}: holds {array.dtype}, expected one of {', '.join(FLOATS)}")
        if len(array.shape) not in (2, 3) or array.shape[-1] < 1:
            raise StoreError(
                f"{array.where}: has shape {list(array.shape)}, expected [rows, d_in] or [samples, positions, d_in]"
            )
        self.where, self.dtype, self.d_in = array.where, array.dtype, array.shape[-1]
        self._array, self.lengths = array, array.lengths
        if array.lengths is None and len(array.shape) == 3:
            self.lengths = np.full(array.shape[0], array.shape[1], np.int64)
        self._offsets = None if self.lengths is None else np.concatenate([[0], np.cumsum(self.lengths)])
        self.n_rows = array.shape[0] if self._offsets is None else int(self._offsets[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` … `stop` − 1 as stored [n, d_in]: floats, or the bits (uint16) of bfloat16."""
        if self._offsets is None:
            return self._array.read(start, stop)
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        base = int(self._offsets[first])
        return self._array.read(first, last).reshape(-1, self.d_in)[start - base : stop - base]


def in_memory(name: str, array: np.ndarray) -> StoredArray:
    """An array that a program holds."""
    return StoredArray(name, array.shape, _dtype_name(array.dtype, name), lambda start, stop: array[start:stop])


def open_arrays(path: Path) -> ArraySource:
    """The arrays in a file, a Zarr array or group, or a directory of these; parts with one name are joined later.

    Arrays of one file have the names that they have there; the array of an .npy file has the file's name.
    Raises: StoreError for a missing path, or one that holds no array that can be read.
    """
    if not path.exists():
        raise StoreError(f"{path}: no such file or directory. {READS}")
    if _is_zarr(path):
        return ArraySource(path, _zarr_arrays(path))
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise StoreError(f"{path}: cannot be read. {_ADVICE.get(path.suffix, READS)}")
        return ArraySource(path, _file_arrays(path))
    return _directory_arrays(path)


def _directory_arrays(path: Path) -> ArraySource:
    """The arrays of all files in a directory, in the order of the numbers in their names; equal names are parts."""
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise StoreError(f"{path} holds several splits ({splits}): name one of these directories")
    parts: dict[str, list[StoredArray]] = {}
    unread = []
    for entry in sorted(path.iterdir(), key=lambda p: natural(p.name)):
        if entry.name.startswith("."):
            continue
        if _is_zarr(entry):
            found = {f"{entry.stem}.{name}" if name else entry.stem: a for name, a in _zarr_arrays(entry).items()}
        elif entry.is_file() and entry.suffix in SUFFIXES:
            found = _file_arrays(entry)
        else:
            unread.append(entry.name)
            continue
        for name, array in found.items():
            parts.setdefault(name, []).append(array)
    if not parts:
        raise StoreError(f"{path}: holds no array. {READS}")
    return ArraySource(path, {name: joined(some) for name, some in parts.items()}, tuple(unread))


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names by their value: part-2 before part-10."""
    return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"(\d+)", name) if s]


def joined(parts: list[StoredArray]) -> StoredArray:
    """Several arrays as one, end to end. Raises: StoreError unless all axes but the first are equal."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts:
        if (part.dtype, part.shape[1:]) != (first.dtype, first.shape[1:]):
            raise StoreError(
                f"{part.where} ({part.dtype} {list(part.shape)}) and {first.where} ({first.dtype} "
                f"{list(first.shape)}) are not parts of one array: all axes but the first must be equal"
            )
    sizes = [part.shape[0] for part in parts]
    lengths = [part.lengths for part in parts if part.lengths is not None]
    return StoredArray(
        f"{first.where} … {parts[-1].where}",
        (sum(sizes), *first.shape[1:]),
        first.dtype,
        read_parts(sizes, lambda part, start, stop: parts[part].read(start, stop)),
        np.concatenate(lengths) if lengths else None,
    )


# --- formats ---------------------------------------------------------------------------------------------------------


def _file_arrays(path: Path) -> dict[str, StoredArray]:
    if path.suffix == ".npy":
        return {path.stem: _npy(path)}
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return {
        column.name: StoredArray(f"{path}: {column.name}", column.shape, column.dtype, column.read, column.lengths)
        for column in arrow_arrays.columns(path)
    }


def _npy(path: Path) -> StoredArray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise StoreError(f"{path}: cannot be read as .npy ({error})") from error
    if array.dtype.kind == "V":
        raise StoreError(
            f"{path}: holds {array.dtype.str}, bytes without a number format: numpy does not save bfloat16. Save it as "
            "float32, or as .safetensors, which keeps bfloat16"
        )
    return StoredArray(
        str(path), array.shape, _dtype_name(array.dtype, str(path)), lambda start, stop: np.asarray(array[start:stop])
    )


def _safetensors(path: Path) -> dict[str, StoredArray]:
    """The header says where each tensor lies in the file; the tensors stay on disk."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length < path.stat().st_size:
                raise ValueError("its header is damaged")
            header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = _tensor(path, name, entry, 8 + length)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: cannot be read as .safetensors ({error})") from error
    return found


def _tensor(path: Path, name: str, entry: dict[str, Any], data: int) -> StoredArray:
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"], str(entry["dtype"]))
    shape = tuple(int(n) for n in entry["shape"])
    stored = np.dtype("uint16" if dtype == "bfloat16" else dtype if dtype.islower() else "uint8").newbyteorder("<")
    first, end = entry["data_offsets"]
    if dtype.islower() and end - first != stored.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"tensor {name} has {end - first} bytes for shape {list(shape)}")
    if not dtype.islower() or 0 in shape:
        return StoredArray(f"{path}: {name}", shape, dtype, lambda start, stop: np.empty((0, *shape[1:]), stored))
    array = np.memmap(path, stored, mode="r", offset=data + first, shape=shape or (1,))
    return StoredArray(f"{path}: {name}", shape, dtype, lambda start, stop: np.asarray(array[start:stop]))


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def _zarr_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a Zarr group by their path in it; a Zarr array by itself has the directory's name."""
    try:
        node = zarr.open(path, mode="r")
        if isinstance(node, zarr.Array):
            return {path.stem: _zarr_array(node, str(path))}
        if node.attrs.get("kind") in ("activations", "feature-index"):
            raise StoreError(f"{path}: is a store of monosem already; train on it with --acts, or merge stores")
        members: Iterable[tuple[str, Any]] = node.members(max_depth=None)
        return {
            name.replace("/", "."): _zarr_array(member, f"{path}/{name}")
            for name, member in sorted(members, key=lambda pair: natural(pair[0]))
            if isinstance(member, zarr.Array)
        }
    except StoreError:
        raise
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: cannot be read as Zarr ({error})") from error


def _zarr_array(array: zarr.Array[Any], where: str) -> StoredArray:
    dtype = _dtype_name(np.dtype(array.dtype), where)
    return StoredArray(where, tuple(array.shape), dtype, lambda start, stop: np.asarray(array[start:stop]))


def _dtype_name(dtype: np.dtype[Any], where: str) -> str:
    """numpy's name of a number format, whatever the byte order. Raises: StoreError for objects (pickles)."""
    if dtype.kind == "O":
        raise StoreError(f"{where}: holds Python objects; expected an array of numbers")
    return dtype.newbyteorder("=").name
