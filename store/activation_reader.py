"""Reading an activation store: only shards that have a marker, with every checksum checked on the way.

Contexts are numbered over the whole store, those of the held-out split first. Position p of context c is row
`c * seq_len + p` in every array, whether kept or not. A shard is `contexts_per_shard` contexts, and counts only if its
marker exists and its files have the sizes that the marker says.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from store.activation_layout import (
    COMPLETE,
    METADATA,
    TEXT_ARRAYS,
    VOCABULARY,
    acts_name,
    array_names,
    marker_key,
    metadata_problems,
)
from store.common import HELD_OUT, LANES, SPLITS, TRAIN, DocumentRecord, RowFilter, StoreError
from store.places import Place
from store.schema import decode, json_bytes, parse_json, stored_dtype
from store.shards import Marker, ShardedArray, files_present, parse_marker


@dataclass(frozen=True, eq=False)
class Contexts:
    """Text of one shard: arrays [contexts, seq_len]; context i is `first_context + i`."""

    tokens: np.ndarray  # uint32
    keep: np.ndarray  # bool: False on BOS and padding
    document: np.ndarray  # int32 number in the document table, -1 on padding
    first_context: int


@dataclass(frozen=True, eq=False)
class Totals:
    """Moments over kept rows: `mean` [d_in] in float64 and `mean_sq_norm` = mean of ‖x‖².

    `units_l0` is the mean number of entries that are not 0, `units_participation_ratio` the mean of (Σa²)² / Σa⁴ over
    the entries a of a row; both are None if a shard of version 0.1, which did not record them, is among them.
    """

    kept_rows: int
    mean: np.ndarray
    mean_sq_norm: float
    units_l0: float | None = None
    units_participation_ratio: float | None = None


@dataclass(frozen=True)
class Problem:
    """Something wrong with a shard, or (shard None) with the whole store; the text says how to repair it."""

    split: str | None
    shard: int | None
    text: str
    key: str = ""  # of the shard's marker

    def __str__(self) -> str:
        return self.text


class ActivationReader:
    """Reads one `acts.zarr`."""

    def __init__(self, place: Place, attributes: dict[str, Any]) -> None:
        self.place = place
        self.attributes = attributes
        self.seq_len: int = attributes["seq_len"]
        self.contexts_per_shard: int = attributes["contexts_per_shard"]
        self.hook_points: dict[str, int] = attributes["hook_points"]
        self.dtype: dict[str, str] = attributes["dtype"]
        self.n_shards: dict[str, int] = attributes["n_shards"]
        self.provenance: dict[str, Any] = attributes["provenance"]
        self.ring_shards_per_lane: int | None = attributes.get("ring_shards_per_lane")
        self.text_lanes: dict[str, int] = attributes.get("text_lanes", dict.fromkeys(SPLITS, LANES))
        self.whole: ActivationReader = self  # the store without a row filter (`store.filtered`)
        self.row_filter = RowFilter()
        self._arrays: dict[str, ShardedArray] = {}

    @property
    def path(self) -> Path | str:
        """The directory, or the URL of a remote store."""
        return self.place.path

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self.path).rstrip("/").rsplit("/", 1)[-1]

    @property
    def rows_per_shard(self) -> int:
        """Rows of a full shard, kept or not."""
        return self.contexts_per_shard * self.seq_len

    def asked_rows(self, split: str) -> int:
        """Rows of a split in a store whose every shard is full; of a ring, those that it keeps at once."""
        self._check_split(split)
        shards = self.n_shards[split]
        if split == TRAIN and self.ring_shards_per_lane is not None:
            shards = min(shards, self.ring_shards_per_lane * LANES)
        return shards * self.rows_per_shard

    @property
    def shard_bytes(self) -> int:
        """Bytes of a full shard's arrays (its marker and the checksums of its files add less than 1%)."""
        row = sum(d_in * stored_dtype(self.dtype[hook]).itemsize for hook, d_in in self.hook_points.items())
        return self.rows_per_shard * (row + sum(np.dtype(kind).itemsize for kind, _ in TEXT_ARRAYS.values()))

    # ---- rows, text, totals ----

    def markers(self, split: str) -> dict[int, Marker]:
        """The written shards of a split by number, ascending: those whose files have the sizes in their marker."""
        self._check_split(split)
        sizes = self.place.sizes()
        found = {}
        for key, raw in self.place.read_all(f"markers/{split}").items():
            try:
                marker = parse_marker(raw, _shard_of(key), self.place.where(key))
            except StoreError:
                continue
            if all(sizes.get(name) == entry["bytes"] for name, entry in marker.files.items()):
                found[marker.shard] = marker
        return found

    def read_acts(self, split: str, shard: int, hook_point: str) -> np.ndarray:
        """Activations of a written shard, float32 [rows, d_in], rows not kept included.

        Raises: StoreError if the shard is not written, or naming a damaged file and its repair.
        """
        return decode(self.read_stored(split, shard, hook_point), self.dtype[hook_point])

    def read_stored(self, split: str, shard: int, hook_point: str) -> np.ndarray:
        """As `read_acts`, but in the dtype on disk (uint16 bits for bfloat16)."""
        if hook_point not in self.hook_points:
            known = ", ".join(self.hook_points)
            raise StoreError(f"{self.path} has no hook point {hook_point!r}: it has {known}")
        marker = self.marker(split, shard)
        if marker.contexts == 0:
            return np.empty((0, self.hook_points[hook_point]), stored_dtype(self.dtype[hook_point]))
        return self._read(split, marker, acts_name(hook_point))[: marker.rows]

    def read_contexts(self, split: str, shard: int) -> Contexts:
        """Tokens, keep mask and document numbers of a written shard's filled contexts.

        Raises: StoreError as `read_acts` does.
        """
        marker = self.marker(split, shard)
        arrays = {
            name: self._read(split, marker, name)[: marker.contexts]
            if marker.contexts
            else np.empty((0, self.seq_len), kind)
            for name, (kind, _) in TEXT_ARRAYS.items()
        }
        return Contexts(**arrays, first_context=self.first_context(split, shard))

    def read_keep(self, split: str, shard: int) -> np.ndarray:
        """As `read_contexts`, the mask alone: bool [contexts, seq_len]."""
        marker = self.marker(split, shard)
        if not marker.contexts:
            return np.empty((0, self.seq_len), bool)
        return self._read(split, marker, "keep")[: marker.contexts]

    def documents(self, split: str) -> dict[int, DocumentRecord]:
        """The document table of the written shards, by document number."""
        table: dict[int, DocumentRecord] = {}
        for shard, marker in self.markers(split).items():
            for number, entry in marker.documents.items():
                if table.setdefault(number, entry) != entry:
                    raise StoreError(
                        f"{self.path}: {split} shard {shard} calls document {number} "
                        f"{entry[0]!r}, an earlier shard {table[number][0]!r}; harvest again"
                    )
        return dict(sorted(table.items()))

    def vocabulary(self) -> list[bytes]:
        """The bytes that each token id stands for, in a store whose rows came as arrays."""
        held = parse_json(self.place.read(VOCABULARY), self.place.where(VOCABULARY))
        return [token.encode("latin-1") for token in held]

    def totals(self, split: str, hook_point: str) -> Totals:
        """Moments over the kept rows of the written shards.

        Raises: StoreError if no row is kept.
        """
        markers = self.markers(split)
        kept = sum(marker.kept_rows for marker in markers.values())
        if hook_point not in self.hook_points or kept == 0:
            raise StoreError(
                f"{self.path}: no kept rows of {hook_point!r} in split {split!r} "
                f"({len(markers)} of {self.n_shards[split]} shards written; "
                f"hook points: {', '.join(self.hook_points)})"
            )
        total = np.zeros(self.hook_points[hook_point])
        total_sq = 0.0
        for marker in markers.values():
            total += marker.sum[hook_point]
            total_sq += marker.sum_sq[hook_point]
        filled = [marker for marker in markers.values() if marker.kept_rows]
        units = [marker.units[hook_point] for marker in filled if marker.units is not None]
        if len(units) < len(filled):
            return Totals(kept, total / kept, total_sq / kept)
        active, participation = (sum(each) for each in zip(*units, strict=True))
        return Totals(kept, total / kept, total_sq / kept, active / kept, participation / kept)

    def fingerprint(self, split: str) -> str:
        """SHA-256 over the markers of the written shards that have rows; it changes with the rows."""
        digest = hashlib.sha256()
        for shard, marker in self.markers(split).items():
            if marker.contexts:
                digest.update(json_bytes(marker.to_json(), f"{split} shard {shard}"))
        return digest.hexdigest()

    def first_context(self, split: str, shard: int) -> int:
        """Number, over the whole store, of the first context of a split's shard."""
        return self._number(split, shard) * self.contexts_per_shard

    @property
    def is_complete(self) -> bool:
        """Whether `finish` was called and markers and file sizes are still as they were then."""
        try:
            complete = parse_json(self.place.read(COMPLETE), self.place.where(COMPLETE))
            expected = complete["sha256"], complete["settings_sha256"]
        except (StoreError, KeyError, TypeError):
            return False
        found = self._markers_sha256({split: self.markers(split) for split in SPLITS})
        return expected == (found, self.settings_sha256())

    def settings_sha256(self) -> str:
        """SHA-256 of the file that holds the store's settings."""
        return hashlib.sha256(self.place.read(METADATA)).hexdigest()

    # ---- checking ----

    def verify(self) -> list[Problem]:
        """Reads everything and checks every checksum; returns what is wrong, shard by shard."""
        problems = [
            Problem(None, None, text, key) for key, text in metadata_problems(self.place, self.attributes).items()
        ]
        written = self.place.size(COMPLETE) is not None
        for split in SPLITS:
            there = self.place.read_all(f"markers/{split}")
            for key, raw in there.items():
                problems += [Problem(split, _shard_of(key), text, key) for text in self._verify_shard(split, key, raw)]
            missing = sorted(set(range(self.n_shards[split])) - {_shard_of(key) for key in there})
            if missing and written:  # the store was complete, so these existed
                problems += [
                    Problem(split, shard, f"{self.place.where(marker_key(split, shard))}: missing; {_REPAIR}")
                    for shard in missing
                ]
            elif missing:
                problems.append(
                    Problem(
                        None,
                        None,
                        f"{self.path}: {self.n_shards[split] - len(missing)} of {self.n_shards[split]} {split} shards "
                        "are written; repeat the harvest to continue",
                    )
                )
        if not problems and not self.is_complete:
            problems.append(
                Problem(
                    None,
                    None,
                    f"{self.path}: every shard is sound but the harvest did not finish, or a shard "
                    "was written again since; repeat the harvest",
                )
            )
        return problems

    def _verify_shard(self, split: str, key: str, raw: bytes) -> list[str]:
        shard, where = _shard_of(key), self.place.where(key)
        try:
            number = self._number(split, shard)
            marker = parse_marker(raw, shard, where)
        except StoreError as error:
            return [f"{error}; {_REPAIR}"]
        problems = []
        for name in array_names(self.attributes) if marker.contexts else ():
            try:
                block = self._array(name).read(number, marker, _REPAIR)
            except StoreError as error:
                problems.append(str(error))
                continue
            if name == "keep" and int(block.sum()) != marker.kept_rows:
                problems.append(
                    f"{where}: says {marker.kept_rows} kept rows but the shard has {int(block.sum())}; {_REPAIR}"
                )
        return problems

    # ---- where things are ----

    def lane_of(self, shard: int) -> int:
        """The lane that a shard belongs to."""
        return shard % LANES

    def _array(self, name: str) -> ShardedArray:
        if name not in self._arrays:
            if name in TEXT_ARRAYS:
                shape, dtype = (self.contexts_per_shard, self.seq_len), np.dtype(TEXT_ARRAYS[name][0])
            else:
                hook = next(hook for hook in self.hook_points if acts_name(hook) == name)
                shape, dtype = (self.rows_per_shard, self.hook_points[hook]), stored_dtype(self.dtype[hook])
            self._arrays[name] = ShardedArray(self.place, name, shape, dtype)
        return self._arrays[name]

    def _read(self, split: str, marker: Marker, name: str) -> np.ndarray:
        return self._array(name).read(self._number(split, marker.shard), marker, _REPAIR)

    def _number(self, split: str, shard: int) -> int:
        """The number of a split's shard in the whole store."""
        self._check_split(split)
        if not 0 <= shard < self.n_shards[split]:
            raise StoreError(f"{self.path} has {self.n_shards[split]} {split} shards, no number {shard}")
        return shard + (self.n_shards[HELD_OUT] if split == TRAIN else 0)

    def _check_split(self, split: str) -> None:
        if split not in SPLITS:
            raise StoreError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")

    def marker(self, split: str, shard: int) -> Marker:
        """What is known of a written shard. Raises: StoreError if it is not written or its marker is damaged."""
        self._number(split, shard)
        key = marker_key(split, shard)
        if self.place.size(key) is None:
            raise StoreError(f"{self.path}: {split} shard {shard} is not written; repeat the harvest to continue")
        return parse_marker(self.place.read(key), shard, self.place.where(key))

    def _usable_marker(self, split: str, shard: int) -> Marker | None:
        try:
            marker = self.marker(split, shard)
        except StoreError:
            return None
        return marker if files_present(self.place, marker) else None

    def _markers_sha256(self, markers: dict[str, dict[int, Marker]]) -> str:
        digest = hashlib.sha256()
        for split in SPLITS:
            there = self.place.read_all(f"markers/{split}")
            for shard in markers[split]:
                digest.update(there[marker_key(split, shard)])
        return digest.hexdigest()


_REPAIR = "`sae verify --repair` harvests this shard again"


def _shard_of(key: str) -> int:
    stem = key.rsplit("/", 1)[-1].removesuffix(".json")
    return int(stem) if stem.isdigit() else -1
