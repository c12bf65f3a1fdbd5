"""One shard on disk: its array files, and the marker that says they are whole.

A shard file is one Zarr chunk: the elements in C order, little endian, then a CRC-32C of them.
Zarr reads a missing file as zeros and an empty one (3.1) too, so nothing is read here unless its
marker says how many bytes and which checksum it must have.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from store.schema import (
    PARTIAL_SUFFIX,
    StoreError,
    crc32c,
    decode,
    fsync_directory,
    fsync_file,
    read_json,
)

Document = tuple[str, str, str, str]  # id, source, domain, sha256 of the text

_CRC_BYTES = 4
_SUM_ROWS = 1024  # rows widened to float64 at a time; part of the result's bits, so a constant


@dataclass(frozen=True, eq=False)
class Marker:
    """What is known of one whole shard. `sum` is Σx and `sum_sq` Σ‖x‖² over kept rows, float64."""

    shard: int
    rows: int
    contexts: int
    kept_rows: int
    files: dict[str, dict[str, int]]  # path under the store → {"bytes", "crc32c"}
    sum: dict[str, np.ndarray]
    sum_sq: dict[str, float]
    cursor: dict[str, Any]
    documents: dict[int, Document]

    def to_json(self) -> dict[str, Any]:
        """The object that is written to the marker file."""
        return {
            "shard": self.shard,
            "rows": self.rows,
            "contexts": self.contexts,
            "kept_rows": self.kept_rows,
            "files": self.files,
            "sum": {
                hook: base64.b64encode(vector.astype("<f8").tobytes()).decode("ascii")
                for hook, vector in self.sum.items()
            },
            "sum_sq": self.sum_sq,
            "cursor": self.cursor,
            "documents": {str(n): list(document) for n, document in self.documents.items()},
        }


def read_marker(path: Path) -> Marker:
    """The marker in a file; StoreError if it is missing, damaged or another shard's."""
    fields = read_json(path)
    try:
        if int(fields["shard"]) != int(path.stem):
            raise ValueError(f"it is of shard {fields['shard']}")
        return Marker(
            shard=int(fields["shard"]),
            rows=int(fields["rows"]),
            contexts=int(fields["contexts"]),
            kept_rows=int(fields["kept_rows"]),
            files=fields["files"],
            sum={
                hook: np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64)
                for hook, text in fields["sum"].items()
            },
            sum_sq=fields["sum_sq"],
            cursor=fields["cursor"],
            documents={int(n): tuple(entry) for n, entry in fields["documents"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path}: not a shard marker ({error!r})") from error


def files_present(root: Path, marker: Marker) -> bool:
    """Whether every file of a marker exists with its size (the contents are not read)."""
    try:
        return all((root / name).stat().st_size == entry["bytes"] for name, entry in marker.files.items())
    except FileNotFoundError:
        return False


def kept_sums(stored: np.ndarray, keep: np.ndarray, dtype: str) -> tuple[np.ndarray, float]:
    """Σx [d_in] and Σ‖x‖² over kept rows of `stored` [rows, d_in], of the values as stored.

    Added row after row (no BLAS, whose threads reorder sums), so equal rows give equal bits.
    """
    total = np.zeros(stored.shape[1])
    total_sq = np.zeros(stored.shape[1])
    for start in range(0, len(stored), _SUM_ROWS):
        part = slice(start, start + _SUM_ROWS)
        rows = decode(stored[part][keep[part]], dtype).astype(np.float64)
        total += rows.sum(axis=0)
        np.square(rows, out=rows)
        total_sq += rows.sum(axis=0)
    return total, math.fsum(total_sq.tolist())


class ShardedArray:
    """A Zarr array whose shards (equal runs of the first axis) are written once, whole."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        # A handle does not inherit this from creation, and without it a shard that is all fill
        # value (contexts without a kept row, say) would have no file.
        self._array = zarr.open_array(str(root / name), mode="r+").with_config({"write_empty_chunks": True})

    @staticmethod
    def create(
        group: zarr.Group,
        name: str,
        *,
        n_shards: int,
        shard_shape: tuple[int, int],
        dtype: np.dtype[Any],
        fill: int | bool,
        attributes: dict[str, Any],
    ) -> None:
        """Make the array's metadata for shards of shape [length, width]; no data yet."""
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

    def file_name(self, shard: int) -> str:
        """Path of a shard's file under the store."""
        return f"{self.name}/c/{shard}/0"

    def remove(self, shard: int) -> None:
        """Delete a shard's file, if any: Zarr may read what it overwrites, and fails on damage."""
        (self.root / self.file_name(shard)).unlink(missing_ok=True)

    def write(self, shard: int, block: np.ndarray) -> dict[str, int]:
        """Write a whole shard to disk for good; returns its marker entry {"bytes", "crc32c"}.

        The checksum is of the elements alone. That of the file, which ends in its own, would be
        the same number for every file.
        """
        self.remove(shard)
        length = self._array.chunks[0]
        assert block.shape == self._array.chunks
        self._array[shard * length : (shard + 1) * length] = block
        file = self.root / self.file_name(shard)
        fsync_file(file)
        for directory in (file.parent, file.parent.parent, self.root / self.name):
            fsync_directory(directory)
        size = file.stat().st_size
        assert size == block.nbytes + _CRC_BYTES
        return {"bytes": size, "crc32c": crc32c(block)}

    def read(self, shard: int, marker: Marker, repair: str) -> np.ndarray:
        """A whole shard as stored, including its padding, after its size and checksum were proven.

        Raises StoreError that names the file and says how to `repair` it.
        """
        name = self.file_name(shard)
        file = self.root / name
        entry = marker.files[name]
        size = file.stat().st_size if file.exists() else None
        if size != entry["bytes"]:
            found = "the file is missing" if size is None else f"got {size} bytes"
            raise StoreError(f"{file}: {found}, expected {entry['bytes']} bytes; {repair}")
        length = self._array.chunks[0]
        try:
            block = np.asarray(self._array[shard * length : (shard + 1) * length])
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(f"{file}: damaged ({error}); {repair}") from error
        found_crc = crc32c(block)
        if found_crc != entry["crc32c"]:
            raise StoreError(f"{file}: damaged: checksum {found_crc:08x}, expected {entry['crc32c']:08x}; {repair}")
        return block


def remove_partial_files(root: Path) -> None:
    """Delete what a killed writer left half-written; only for who holds the writer's lock."""
    for file in root.rglob(f"*{PARTIAL_SUFFIX}"):
        if file.is_file():
            file.unlink(missing_ok=True)
