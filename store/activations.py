"""The activation store: rows of a language model's hooks, each row's text found by arithmetic.

Contexts are numbered over the whole store, those of the held-out split first. Position p of context
c is row `c * seq_len + p` in every array, whether kept or not. A shard is `contexts_per_shard`
contexts; it is written once, whole, and counts only when its marker exists: a writer killed at any
moment loses at most the shard it was writing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from store.activation_input import ShardInput, check_settings, differences
from store.activation_layout import (
    KIND,
    LANES,
    SPLITS,
    TEXT_ARRAYS,
    acts_name,
    build,
    is_vacant,
    lock_file,
    read_attributes,
)
from store.schema import (
    FORMAT_VERSION,
    StoreError,
    atomic_json,
    decode,
    exclusive_lock,
    fsync_directory,
    read_json,
    stored_dtype,
)
from store.shards import (
    Document,
    Marker,
    ShardedArray,
    files_present,
    kept_sums,
    read_marker,
    remove_partial_files,
)


@dataclass(frozen=True, eq=False)
class Contexts:
    """Text of one shard: arrays [contexts, seq_len]; context i is `first_context + i`."""

    tokens: np.ndarray  # uint32
    keep: np.ndarray  # bool: False on BOS and padding
    document: np.ndarray  # int32 number in the document table, -1 on padding
    first_context: int


@dataclass(frozen=True, eq=False)
class Totals:
    """Moments over kept rows: `mean` [d_in] in float64 and `mean_sq_norm` = mean of ‖x‖²."""

    kept_rows: int
    mean: np.ndarray
    mean_sq_norm: float


class ActivationStore:
    """One `acts.zarr` directory. Make one with `create` or `open`."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.seq_len: int = attributes["seq_len"]
        self.contexts_per_shard: int = attributes["contexts_per_shard"]
        self.hook_points: dict[str, int] = attributes["hook_points"]
        self.n_shards: dict[str, int] = attributes["n_shards"]
        self.provenance: dict[str, Any] = attributes["provenance"]
        self.dtype: str = next(iter(attributes["dtype"].values()))
        self._held = False
        self._arrays: dict[str, ShardedArray] = {}

    @property
    def rows_per_shard(self) -> int:
        """Rows of a full shard, kept or not."""
        return self.contexts_per_shard * self.seq_len

    # ---- making and opening ----

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        hook_points: dict[str, int],
        seq_len: int,
        contexts_per_shard: int,
        n_shards: dict[str, int],
        dtype: str,
        provenance: dict[str, Any],
    ) -> ActivationStore:
        """Make an empty store, or open the one that is there if it was made in just this way.

        `hook_points` is {name: d_in}, `n_shards` {"heldout": n, "train": n}, `dtype` one of
        float16, bfloat16, float32. Raises StoreError naming every setting that differs from an
        existing store's; that store is not touched.
        """
        path = Path(path)
        wanted = check_settings(
            {
                "kind": KIND,
                "format": FORMAT_VERSION,
                "seq_len": seq_len,
                "contexts_per_shard": contexts_per_shard,
                "dtype": dict.fromkeys(hook_points, dtype),
                "hook_points": hook_points,
                "n_shards": n_shards,
                "lanes": LANES,
                "provenance": provenance,
            }
        )
        if not is_vacant(path):
            return cls._resume(path, wanted)
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(lock_file(path), str(path)):
            if is_vacant(path):
                build(Path(os.path.realpath(path)), wanted)
        return cls._resume(path, wanted)

    @classmethod
    def _resume(cls, path: Path, wanted: dict[str, Any]) -> ActivationStore:
        store = cls.open(path)
        found = differences(read_attributes(path), wanted)
        if found:
            lines = "\n  ".join(found)
            raise StoreError(
                f"{path} was made with other settings, and nothing in it was changed:\n  {lines}\n"
                "Use the same settings to go on with it, or choose another output path."
            )
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ActivationStore:
        """Open a store to read it, or to go on writing it.

        Raises StoreError if there is none, if it is damaged or if a newer version made it.
        """
        path = Path(path)
        return cls(path, read_attributes(path))

    @contextlib.contextmanager
    def hold(self) -> Iterator[ActivationStore]:
        """Be the one writer for a while; removes what a killed writer left half-written.

        Raises StoreError naming the process (and host) that is writing already.
        """
        with exclusive_lock(lock_file(self.path), str(self.path)):
            remove_partial_files(self.path)
            self._held = True
            try:
                yield self
            finally:
                self._held = False

    # ---- writing ----

    def write_shard(
        self,
        split: str,
        shard: int,
        *,
        acts: dict[str, np.ndarray],
        tokens: np.ndarray,
        keep: np.ndarray,
        document: np.ndarray,
        documents: dict[int, Document],
        cursor: dict[str, Any],
    ) -> Marker:
        """Write one shard: files first, all on disk, then its marker.

        `acts` maps each hook to [contexts * seq_len, d_in] (or [contexts, seq_len, d_in]); the
        others are [contexts, seq_len]. Fewer contexts than a shard holds are padded; none at all
        marks a shard for which no text was left. `cursor` is the caller's own. Takes the writer's
        lock unless held. Raises StoreError if the shard is written already, if a shape does not
        fit, or if a value is not finite in the store's dtype; then nothing is marked.
        """
        number = self._number(split, shard)
        given = ShardInput.check(
            acts=acts,
            tokens=tokens,
            keep=keep,
            document=document,
            documents=documents,
            hook_points=self.hook_points,
            seq_len=self.seq_len,
            dtype=self.dtype,
            shard_contexts=self.contexts_per_shard,
            first_context=self.first_context(split, shard),
        )
        with contextlib.nullcontext() if self._held else self.hold():
            marker_file = self._marker_file(split, shard)
            if self._usable_marker(marker_file) is not None:
                raise StoreError(
                    f"{self.path}: {split} shard {shard} is written already; delete {marker_file} to write it again"
                )
            # From here to the new marker the shard does not exist for any reader.
            (self.path / "complete.json").unlink(missing_ok=True)
            marker_file.unlink(missing_ok=True)
            fsync_directory(marker_file.parent)
            files = {}
            for name in self._array_names():
                array = self._array(name)
                if given.contexts == 0:
                    array.remove(number)
                else:
                    files[array.file_name(number)] = array.write(number, given.blocks[name])
            kept = given.kept
            sums = {
                hook: kept_sums(given.blocks[acts_name(hook)][: kept.size], kept, self.dtype)
                for hook in self.hook_points
            }
            marker = Marker(
                shard=shard,
                rows=given.contexts * self.seq_len,
                contexts=given.contexts,
                kept_rows=int(kept.sum()),
                files=files,
                sum={hook: vector for hook, (vector, _) in sums.items()},
                sum_sq={hook: scalar for hook, (_, scalar) in sums.items()},
                cursor=cursor,
                documents=given.documents,
            )
            atomic_json(marker_file, marker.to_json())
        return marker

    def finish(self) -> None:
        """Declare the store complete; StoreError if a shard of either split is not written."""
        with contextlib.nullcontext() if self._held else self.hold():
            markers = {split: self.markers(split) for split in SPLITS}
            for split in SPLITS:
                missing = sorted(set(range(self.n_shards[split])) - set(markers[split]))
                if missing:
                    raise StoreError(
                        f"{self.path} is not complete: {len(missing)} of {self.n_shards[split]} "
                        f"{split} shards are not written (the first is {missing[0]}); "
                        "repeat the harvest to go on"
                    )
            atomic_json(
                self.path / "complete.json",
                {
                    "rows": {s: sum(m.rows for m in markers[s].values()) for s in SPLITS},
                    "kept_rows": {s: sum(m.kept_rows for m in markers[s].values()) for s in SPLITS},
                    "sha256": self._markers_sha256(markers),
                },
            )

    # ---- reading ----

    def markers(self, split: str) -> dict[int, Marker]:
        """Written shards of a split by number, ascending: those whose files have their sizes."""
        self._check_split(split)
        found = {}
        for file in sorted((self.path / "markers" / split).glob("*.json")):
            marker = self._usable_marker(file)
            if marker is not None:
                found[marker.shard] = marker
        return found

    def read_acts(self, split: str, shard: int, hook_point: str) -> np.ndarray:
        """Activations of a written shard, float32 [rows, d_in], rows not kept included.

        Raises StoreError if the shard is not written, or naming the damaged file and the repair.
        """
        return decode(self.read_stored(split, shard, hook_point), self.dtype)

    def read_stored(self, split: str, shard: int, hook_point: str) -> np.ndarray:
        """As `read_acts`, but in the dtype on disk (uint16 bits for bfloat16), not widened."""
        if hook_point not in self.hook_points:
            known = ", ".join(self.hook_points)
            raise StoreError(f"{self.path} has no hook point {hook_point!r}: it has {known}")
        marker = self._marker(split, shard)
        if marker.contexts == 0:
            return np.empty((0, self.hook_points[hook_point]), stored_dtype(self.dtype))
        return self._read(split, marker, acts_name(hook_point))[: marker.rows]

    def read_contexts(self, split: str, shard: int) -> Contexts:
        """Tokens, keep mask and document numbers of a written shard's filled contexts.

        Raises StoreError as `read_acts` does.
        """
        marker = self._marker(split, shard)
        arrays = {
            name: self._read(split, marker, name)[: marker.contexts]
            if marker.contexts
            else np.empty((0, self.seq_len), kind)
            for name, (kind, _) in TEXT_ARRAYS.items()
        }
        return Contexts(**arrays, first_context=self.first_context(split, shard))

    def documents(self, split: str) -> dict[int, Document]:
        """Document table of the written shards: number → (id, source, domain, sha256)."""
        table: dict[int, Document] = {}
        for shard, marker in self.markers(split).items():
            for number, entry in marker.documents.items():
                if table.setdefault(number, entry) != entry:
                    raise StoreError(
                        f"{self.path}: {split} shard {shard} calls document {number} "
                        f"{entry[0]!r}, an earlier shard {table[number][0]!r}; harvest again"
                    )
        return dict(sorted(table.items()))

    def totals(self, split: str, hook_point: str) -> Totals:
        """Mean and mean squared norm over the kept rows of the written shards.

        Raises StoreError if no row is kept.
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
        return Totals(kept, total / kept, total_sq / kept)

    def first_context(self, split: str, shard: int) -> int:
        """Number, over the whole store, of the first context of a split's shard."""
        return self._number(split, shard) * self.contexts_per_shard

    @property
    def is_complete(self) -> bool:
        """Whether `finish` was called and every shard is still as it was then (sizes, markers)."""
        try:
            expected = read_json(self.path / "complete.json")["sha256"]
        except (StoreError, KeyError, TypeError):
            return False
        return expected == self._markers_sha256({split: self.markers(split) for split in SPLITS})

    def verify(self) -> list[str]:
        """Read everything and check every checksum; the problems found, as sentences."""
        problems: list[str] = []
        for split in SPLITS:
            files = sorted((self.path / "markers" / split).glob("*.json"))
            for file in files:
                problems += self._verify_shard(split, file)
            if len(files) < self.n_shards[split]:
                problems.append(
                    f"{self.path}: {len(files)} of {self.n_shards[split]} {split} shards are "
                    "written; repeat the harvest to go on"
                )
        if not problems and not self.is_complete:
            problems.append(
                f"{self.path}: every shard is sound but the harvest did not finish, or a shard "
                "was written again since; repeat the harvest"
            )
        return problems

    def _verify_shard(self, split: str, marker_file: Path) -> list[str]:
        problems = []
        try:
            marker = read_marker(marker_file)
        except StoreError as error:
            return [f"{error}; {_repair(marker_file)}"]
        for name in self._array_names() if marker.contexts else ():
            try:
                block = self._read(split, marker, name)
            except StoreError as error:
                problems.append(str(error))
                continue
            if name == "keep" and int(block.sum()) != marker.kept_rows:
                problems.append(
                    f"{marker_file}: says {marker.kept_rows} kept rows but the shard has "
                    f"{int(block.sum())}; {_repair(marker_file)}"
                )
        return problems

    # ---- where things are ----

    def _array_names(self) -> list[str]:
        return [acts_name(hook) for hook in self.hook_points] + list(TEXT_ARRAYS)

    def _array(self, name: str) -> ShardedArray:
        if name not in self._arrays:
            self._arrays[name] = ShardedArray(self.path, name)
        return self._arrays[name]

    def _read(self, split: str, marker: Marker, name: str) -> np.ndarray:
        repair = _repair(self._marker_file(split, marker.shard))
        return self._array(name).read(self._number(split, marker.shard), marker, repair)

    def _number(self, split: str, shard: int) -> int:
        """Number of a split's shard over the whole store."""
        self._check_split(split)
        if not 0 <= shard < self.n_shards[split]:
            raise StoreError(f"{self.path} has {self.n_shards[split]} {split} shards, no number {shard}")
        return shard + (self.n_shards["heldout"] if split == "train" else 0)

    def _check_split(self, split: str) -> None:
        if split not in SPLITS:
            raise StoreError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")

    def _marker_file(self, split: str, shard: int) -> Path:
        return self.path / "markers" / split / f"{shard:08d}.json"

    def _marker(self, split: str, shard: int) -> Marker:
        self._number(split, shard)
        file = self._marker_file(split, shard)
        if not file.exists():
            raise StoreError(f"{self.path}: {split} shard {shard} is not written; repeat the harvest to go on")
        return read_marker(file)

    def _usable_marker(self, file: Path) -> Marker | None:
        try:
            marker = read_marker(file)
        except StoreError:
            return None
        return marker if files_present(self.path, marker) else None

    def _markers_sha256(self, markers: dict[str, dict[int, Marker]]) -> str:
        digest = hashlib.sha256()
        for split in SPLITS:
            for shard in markers[split]:
                digest.update(self._marker_file(split, shard).read_bytes())
        return digest.hexdigest()


def _repair(marker_file: Path) -> str:
    return f"delete {marker_file} and repeat the harvest, which writes this shard again"
