"""The activation store: activations of a language model at its hook points, and the token of each row.

A shard is written once, whole, and counts only when its marker exists: a writer that is killed at any moment loses at
most the shard it was writing. Shards belong to lanes, and each lane has one writer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from store.activation_input import ShardInput, check_settings, differences
from store.activation_layout import (
    COMPLETE,
    KIND,
    METADATA,
    VOCABULARY,
    acts_name,
    array_names,
    marker_key,
    metadata_files,
    metadata_problems,
    parse_attributes,
    read_attributes,
    shard_of_key,
)
from store.activation_reader import ActivationReader, Contexts, Problem, Totals
from store.common import HELD_OUT, LANES, SPLITS, TRAIN, DiskFull, DocumentRecord, StoreError, full_disk
from store.places import Check, LocalPlace, Place
from store.schema import FORMAT_VERSION, json_bytes
from store.shards import Marker, UnitSums, kept_sums

__all__ = ["ActivationStore", "Contexts", "Problem", "Totals"]

ALL_LANES = range(LANES)


class ActivationStore(ActivationReader):
    """One `acts.zarr`, to be read and written. Get one with `create` or `open`."""

    def __init__(self, place: Place, attributes: dict[str, Any]) -> None:
        super().__init__(place, attributes)
        self._held: dict[int, Check] = {}

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        hook_points: dict[str, int],
        seq_len: int,
        contexts_per_shard: int,
        n_shards: dict[str, int],
        dtype: str | Mapping[str, str],
        provenance: dict[str, Any],
        ring_shards_per_lane: int | None = None,
        text_lanes: Mapping[str, int] | None = None,
    ) -> ActivationStore:
        """Creates an empty store, or opens an existing one with the same settings.

        `hook_points` is {name: d_in}, `n_shards` {"heldout": n, "train": n}, `dtype` one of float16, bfloat16, float32,
        or one for each hook point. A ring keeps only the newest `ring_shards_per_lane` training shards of each lane.
        `text_lanes` is how many lanes the text of each split was dealt to, 64 unless given.
        Raises: StoreError naming every setting that differs from those of an existing store, which is not changed.
        """
        place = open_place(path)
        settings = {
            "kind": KIND,
            "format": FORMAT_VERSION,
            "seq_len": seq_len,
            "contexts_per_shard": contexts_per_shard,
            "dtype": dict.fromkeys(hook_points, dtype) if isinstance(dtype, str) else dict(dtype),
            "hook_points": hook_points,
            "n_shards": n_shards,
            "lanes": LANES,
            "provenance": provenance,
        }
        if ring_shards_per_lane is not None:
            settings["ring_shards_per_lane"] = ring_shards_per_lane
        if text_lanes is not None and set(text_lanes.values()) != {LANES}:  # version 0.1 knew no other number
            settings["text_lanes"] = dict(text_lanes)
        wanted = check_settings(settings)
        if place.is_vacant():
            place.create(metadata_files(wanted), [f"markers/{split}" for split in SPLITS])
        found = differences(read_attributes(place), wanted)
        if found:
            lines = "\n  ".join(found)
            raise StoreError(
                f"{path} was made with other settings, and nothing in it was changed:\n  {lines}\n"
                "Use the same settings to continue it, or choose another output path."
            )
        return cls(place, wanted)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ActivationStore:
        """Opens a store to read it, or to continue writing it.

        Raises: StoreError if there is no store, or it is damaged or made by a newer version.
        """
        place = open_place(path)
        return cls(place, read_attributes(place))

    @contextlib.contextmanager
    def hold(
        self, lanes: Iterable[int] = ALL_LANES, *, take_over: bool = False, sweep: bool = True
    ) -> Iterator[ActivationStore]:
        """Makes the caller the only writer of these lanes; `sweep` first removes what a killed writer left in them.

        `take_over` takes remote lanes from an owner that died. Raises: StoreError naming the process (and host) that
        is writing one of the lanes.
        """
        lanes = sorted(lanes)
        with self.place.owned(lanes, take_over=take_over) as check:
            if sweep:
                self.place.delete(*self._leftovers(set(lanes)))
            self._held |= dict.fromkeys(lanes, check)
            try:
                if sweep:
                    self._drop_expired(set(lanes))
                yield self
            finally:
                for lane in lanes:
                    del self._held[lane]

    def _leftovers(self, lanes: set[int]) -> list[str]:
        """Unfinished files of these lanes; with all lanes also those that belong to none."""
        found = []
        for key in self.place.leftovers():
            owner = shard_of_key(key, self.n_shards[HELD_OUT])
            if lanes.issuperset(ALL_LANES) or (owner is not None and self.lane_of(owner[1]) in lanes):
                found.append(key)
        return found

    def sweep(self, *, dry_run: bool = False) -> dict[str, int]:
        """Removes unfinished files and files that no marker lists; returns bytes by key. All lanes must be held."""
        assert self._held.keys() >= set(ALL_LANES)
        sizes = self.place.sizes()
        named = {name for split in SPLITS for marker in self.markers(split).values() for name in marker.files}
        gone = set(self.place.leftovers()) | {
            key for key in sizes if "/c/" in key and key not in named and shard_of_key(key, self.n_shards[HELD_OUT])
        }
        if not dry_run:
            self.place.delete(*gone)
        return {key: sizes[key] for key in sorted(gone)}

    # ---- writing ----

    def write_shard(
        self,
        split: str,
        shard: int,
        *,
        acts: Mapping[str, np.ndarray],
        tokens: np.ndarray,
        keep: np.ndarray,
        document: np.ndarray,
        documents: Mapping[int, DocumentRecord],
        cursor: dict[str, Any],
    ) -> Marker:
        """Writes one shard: first its files, then, once they are on disk, its marker.

        `acts` maps each hook point to [contexts * seq_len, d_in] (or [contexts, seq_len, d_in]); the other arrays are
        [contexts, seq_len]. Fewer contexts than a shard holds are padded; none at all marks a shard for which there was
        no text left. `cursor` is for the caller's own use. Takes the lane's lock unless it is held.
        Raises: StoreError if the shard is written already, a shape does not fit, or a value is not finite in the
        store's dtype; DiskFull if there is no room. Then nothing is marked.
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
        lane = self.lane_of(shard)
        with contextlib.nullcontext() if lane in self._held else self.hold([lane]):
            if self._usable_marker(split, shard) is not None:
                raise StoreError(
                    f"{self.path}: {split} shard {shard} is written already; "
                    f"delete {self.place.where(marker_key(split, shard))} to write it again"
                )
            self.forget(split, shard)
            try:
                files = self._write_files(number, given)
                marker = self._marker_of(shard, given, files, cursor)
                content = json_bytes(marker.to_json(), self.place.where(marker_key(split, shard)))
                self._held[lane](lane)  # raises if the lane is no longer ours: then nothing is marked
                self.place.write(marker_key(split, shard), content)
            except (OSError, DiskFull) as error:
                self._undo(split, shard)
                reason = full_disk(error)
                if reason is None:
                    raise
                raise DiskFull(
                    f"the disk of {self.path} is full ({reason}). Every shard written before is complete and can be "
                    "used as it is; make room and repeat the command to continue"
                ) from error
            if self.ring_shards_per_lane is not None and split == TRAIN and marker.contexts:
                self._make_room_for(shard, self.ring_shards_per_lane * LANES)
        return marker

    def _write_files(self, number: int, given: ShardInput) -> dict[str, dict[str, int]]:
        if given.contexts == 0:
            return {}
        arrays = [self._array(name) for name in array_names(self.attributes)]
        return {array.file_name(number): array.write(number, given.blocks[array.name]) for array in arrays}

    def _marker_of(
        self, shard: int, given: ShardInput, files: dict[str, dict[str, int]], cursor: dict[str, Any]
    ) -> Marker:
        kept = given.kept
        sums = {
            hook: kept_sums(given.blocks[acts_name(hook)][: kept.size], kept, self.dtype[hook])
            for hook in self.hook_points
        }
        return Marker(
            shard=shard,
            rows=given.contexts * self.seq_len,
            contexts=given.contexts,
            kept_rows=int(kept.sum()),
            files=files,
            sum={hook: found.sum for hook, found in sums.items()},
            sum_sq={hook: found.sum_sq for hook, found in sums.items()},
            cursor=cursor,
            documents=given.documents,
            units={hook: found.units for hook, found in sums.items()},
        )

    def forget(self, split: str, shard: int) -> None:
        """Removes a shard; its marker first, so that no reader trusts the rest."""
        self.place.delete(COMPLETE, marker_key(split, shard))
        self._delete_files(split, shard)

    def _delete_files(self, split: str, shard: int) -> None:
        number = self._number(split, shard)
        self.place.delete(*(self._array(name).file_name(number) for name in array_names(self.attributes)))

    def _undo(self, split: str, shard: int) -> None:
        """Frees the room of a shard that could not be finished."""
        with contextlib.suppress(OSError):
            self.forget(split, shard)
            self.place.delete(*self._leftovers({self.lane_of(shard)}))

    def _drop(self, shard: int) -> None:
        """Empties a training shard that has left the ring; its marker keeps the cursor into the text."""
        marker = self._usable_marker(TRAIN, shard) if shard >= 0 else None
        if marker is None or marker.contexts == 0:
            return
        zero = {hook: np.zeros_like(vector) for hook, vector in marker.sum.items()}
        emptied = replace(
            marker,
            rows=0,
            contexts=0,
            kept_rows=0,
            files={},
            sum=zero,
            sum_sq=dict.fromkeys(zero, 0.0),
            documents={},
            units=None if marker.units is None else dict.fromkeys(zero, UnitSums()),
        )
        key = marker_key(TRAIN, shard)
        self.place.write(key, json_bytes(emptied.to_json(), self.place.where(key)), replace=True)
        self._delete_files(TRAIN, shard)

    def _make_room_for(self, shard: int, reach: int) -> None:
        """Empties the shard that leaves the ring when one with rows is written. At the end of the text none leaves."""
        older = self._usable_marker(TRAIN, shard - reach) if shard >= reach else None
        if self.place.size(marker_key(TRAIN, shard + reach)) is not None or (older and not older.contexts):
            self._drop_expired({self.lane_of(shard)})  # it was written again, out of order
        else:
            self._drop(shard - reach)

    def _drop_expired(self, lanes: set[int]) -> None:
        """Empties shards that have left the ring and whose writer was killed before it could do so."""
        if self.ring_shards_per_lane is None:
            return
        newest: dict[int, int] = {}
        markers = self.markers(TRAIN)  # ascending
        for shard, marker in markers.items():
            if marker.contexts:  # one without text drives no other out
                newest[self.lane_of(shard)] = shard
        for shard, marker in markers.items():
            lane = self.lane_of(shard)
            if lane in lanes and marker.contexts and shard <= newest[lane] - self.ring_shards_per_lane * LANES:
                self._drop(shard)

    def write_vocabulary(self, vocabulary: Sequence[bytes]) -> None:
        """Writes the bytes that each token id stands for, in a store whose rows have no tokenizer."""
        self.place.write(VOCABULARY, json_bytes([token.decode("latin-1") for token in vocabulary], VOCABULARY))

    # ---- repair ----

    @classmethod
    def restore_metadata(cls, path: str | os.PathLike[str]) -> list[str]:
        """Writes the arrays' zarr.json again where they are missing or damaged; returns what was wrong, as sentences.

        They follow from the store's own zarr.json. Raises: StoreError if that file is damaged.
        """
        place = open_place(path)
        attributes = parse_attributes(place.read(METADATA), place.where(METADATA))
        wrong = metadata_problems(place, attributes)
        files = metadata_files(attributes)
        for key in wrong:
            place.write(key, files[key], replace=True)
        return list(wrong.values())

    def recorded_files(self, split: str, shard: int | None) -> dict[str, dict[str, int]] | None:
        """Sizes and checksums in a shard's marker, whether its files exist or not; None without a valid marker."""
        try:
            return None if shard is None else self.marker(split, shard).files
        except StoreError:
            return None

    def clear(self, problem: Problem) -> None:
        """Removes the shard that a problem is about, so that a harvest writes it again."""
        if problem.split is None or problem.shard is None:
            return
        if 0 <= problem.shard < self.n_shards[problem.split]:
            self.forget(problem.split, problem.shard)
        else:  # a marker whose shard this store does not have
            self.place.delete(problem.key)

    def finish(self) -> None:
        """Declares the store complete. Raises: StoreError if a shard of either split is not written.

        The file `complete.json` is a function of the markers, so any worker may write it.
        """
        markers = {split: self.markers(split) for split in SPLITS}
        for split in SPLITS:
            missing = sorted(set(range(self.n_shards[split])) - set(markers[split]))
            if missing:
                raise StoreError(
                    f"{self.path} is not complete: {len(missing)} of {self.n_shards[split]} "
                    f"{split} shards are not written (the first is {missing[0]}); "
                    "repeat the harvest to continue"
                )
        content = {
            "asked_rows": {s: self.asked_rows(s) for s in SPLITS},
            "rows": {s: sum(m.rows for m in markers[s].values()) for s in SPLITS},
            "kept_rows": {s: sum(m.kept_rows for m in markers[s].values()) for s in SPLITS},
            "sha256": self._markers_sha256(markers),
            "settings_sha256": self.settings_sha256(),
        }
        self.place.write(COMPLETE, json_bytes(content, self.place.where(COMPLETE)), replace=True)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL (s3://…) rather than a directory."""
    return isinstance(path, str) and "://" in path


def open_place(path: str | os.PathLike[str]) -> Place:
    """The place that a path names: a directory, or the objects behind a URL such as s3://bucket/run/acts.zarr."""
    if is_url(path):
        from store.remote import RemotePlace

        return RemotePlace(str(path))
    return LocalPlace(path)
