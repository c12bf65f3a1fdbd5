"""One shard on disk: its array files, and the marker that says they are complete.

A shard file is one Zarr chunk: the elements in C order, little endian, then their CRC-32C. Zarr reads a missing or
empty file as zeros without an error, so a file is read here only if a marker says which size and checksum it must have.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from store.common import DocumentRecord, StoreError
from store.places import Place
from store.schema import crc32c, decode, parse_json

_CRC_BYTES = 4
_SUM_ROWS = 1024  # rows converted to float64 at a time: decides the order of summation, so it must not change


class UnitSums(NamedTuple):
    """Of the units (entries) of kept rows: how many are not 0, and the sum of (Σa²)² / Σa⁴ of each row (0 if all 0)."""

    active: int = 0
    participation: float = 0.0


@dataclass(frozen=True, eq=False)
class Marker:
    """What is known of one complete shard. `sum` is Σx and `sum_sq` Σ‖x‖² over its kept rows, float64.

    `units` is None in shards of version 0.1.
    """

    shard: int
    rows: int
    contexts: int
    kept_rows: int
    files: dict[str, dict[str, int]]  # path under the store → {"bytes", "crc32c"}
    sum: dict[str, np.ndarray]
    sum_sq: dict[str, float]
    cursor: dict[str, Any]
    documents: dict[int, DocumentRecord]
    units: dict[str, UnitSums] | None = None

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
            **({} if self.units is None else {"units": {hook: sums._asdict() for hook, sums in self.units.items()}}),
            "cursor": self.cursor,
            "documents": {str(n): list(document) for n, document in self.documents.items()},
        }


def parse_marker(raw: bytes, shard: int, where: object) -> Marker:
    """The marker in a file's bytes. Raises: StoreError naming `where` if it is damaged or of another shard."""
    fields = parse_json(raw, where)
    try:
        marker = Marker(
            shard=_count(fields["shard"]),
            rows=_count(fields["rows"]),
            contexts=_count(fields["contexts"]),
            kept_rows=_count(fields["kept_rows"]),
            files={
                str(name): {"bytes": _count(entry["bytes"]), "crc32c": _count(entry["crc32c"])}
                for name, entry in fields["files"].items()
            },
            sum={
                str(hook): np.frombuffer(base64.b64decode(text, validate=True), "<f8").astype(np.float64)
                for hook, text in fields["sum"].items()
            },
            sum_sq={str(hook): float(value) for hook, value in fields["sum_sq"].items()},
            cursor=dict(fields["cursor"]),
            documents={int(n): as_document(n, entry) for n, entry in fields["documents"].items()},
            units={
                str(hook): UnitSums(_count(entry["active"]), float(entry["participation"]))
                for hook, entry in fields["units"].items()
            }
            if "units" in fields
            else None,
        )
        if marker.shard != shard:
            raise ValueError(f"it is of shard {marker.shard}")
        if marker.kept_rows > marker.rows or bool(marker.contexts) != bool(marker.files):
            raise ValueError("its counts contradict each other")
        ratios = [sums.participation for sums in (marker.units or {}).values()]
        if not all(
            np.isfinite([*ratios, *marker.sum_sq.values(), *np.concatenate([np.zeros(1), *marker.sum.values()])])
        ):
            raise ValueError("its sums are not finite")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(f"{where}: not a shard marker ({error!r})") from error
    return marker


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def as_document(number: Any, entry: Any) -> DocumentRecord:
    """An entry of a document table. Raises: StoreError unless it is four strings."""
    if not isinstance(entry, list | tuple) or len(entry) != 4 or not all(isinstance(part, str) for part in entry):
        raise StoreError(f"document {number} must be (id, source, domain, sha256), got {entry!r}")
    return DocumentRecord(*entry)


def files_present(place: Place, marker: Marker) -> bool:
    """Whether every file of a marker exists with its size (the contents are not read)."""
    return all(place.size(name) == entry["bytes"] for name, entry in marker.files.items())


class RowSums(NamedTuple):
    """Sums over kept rows: `sum` is Σx [d_in], `sum_sq` is Σ‖x‖²."""

    sum: np.ndarray
    sum_sq: float
    units: UnitSums


def kept_sums(stored: np.ndarray, keep: np.ndarray, dtype: str) -> RowSums:
    """The sums over the kept rows of `stored` [rows, d_in], of the values as stored.

    Added in a fixed order (without BLAS, whose threads reorder sums), so that equal rows give equal bits.
    """
    total = np.zeros(stored.shape[1])
    total_sq = np.zeros(stored.shape[1])
    active, participation = 0, 0.0
    for start in range(0, len(stored), _SUM_ROWS):
        part = slice(start, start + _SUM_ROWS)
        rows = decode(stored[part][keep[part]], dtype).astype(np.float64)
        total += rows.sum(axis=0)
        active += int(np.count_nonzero(rows))
        np.square(rows, out=rows)
        total_sq += rows.sum(axis=0)
        squares = rows.sum(axis=1)
        np.square(rows, out=rows)
        fourth_powers = rows.sum(axis=1)
        participation += float((squares**2 / np.where(fourth_powers > 0, fourth_powers, 1.0)).sum())
    return RowSums(total, math.fsum(total_sq.tolist()), UnitSums(active, participation))


class ShardedArray:
    """A Zarr array whose shards (equal runs of the first axis) are written once, whole."""

    def __init__(self, place: Place, name: str, shard_shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        """Shape and dtype come from the store's settings, not from the array's own metadata, which could be damaged."""
        self.place, self.name = place, name
        self.shard_shape, self.dtype = shard_shape, dtype.newbyteorder("<")
        self.file_bytes = math.prod(shard_shape) * dtype.itemsize + _CRC_BYTES

    def file_name(self, shard: int) -> str:
        """The key of a shard's file."""
        return f"{self.name}/c/{shard}/0"

    def write(self, shard: int, block: np.ndarray) -> dict[str, int]:
        """Writes a whole shard durably; returns its marker entry {"bytes", "crc32c"}.

        The checksum is that of the elements. That of the file, which ends with its own checksum, would be the same
        number for every file.
        """
        assert block.shape == self.shard_shape
        elements = np.ascontiguousarray(block, self.dtype).reshape(-1).view(np.uint8)
        checksum = crc32c(elements)
        content = b"".join((elements.data, checksum.to_bytes(_CRC_BYTES, "little")))
        self.place.write_chunk(self.file_name(shard), content)
        return {"bytes": len(content), "crc32c": checksum}

    def read(self, shard: int, marker: Marker, repair: str) -> np.ndarray:
        """A whole shard as stored, including its padding, after checking its size and checksum.

        Not through zarr, which would compute the checksum once more and copy twice.
        Raises: StoreError naming the file and saying how to `repair` it.
        """
        name = self.file_name(shard)
        where = self.place.where(name)
        entry = marker.files.get(name)
        if entry is None:
            raise StoreError(f"{where}: the shard's marker does not list this file; {repair}")
        size = self.place.size(name)
        if not size == entry["bytes"] == self.file_bytes:
            found = "the file is missing" if size is None else f"got {size} bytes"
            raise StoreError(f"{where}: {found}, expected {self.file_bytes} bytes; {repair}")
        unreadable: tuple[type[Exception], ...] = (OSError, *self.place.errors)
        try:
            raw = self.place.load(name)
        except unreadable as error:
            raise StoreError(f"{where}: cannot be read ({error}); {repair}") from error
        elements, own_crc = raw[:-_CRC_BYTES], int.from_bytes(raw[-_CRC_BYTES:].tobytes(), "little")
        for found_crc in (crc32c(elements), own_crc):
            if found_crc != entry["crc32c"]:
                raise StoreError(
                    f"{where}: damaged: checksum {found_crc:08x}, expected {entry['crc32c']:08x}; {repair}"
                )
        return elements.view(self.dtype).reshape(self.shard_shape)
