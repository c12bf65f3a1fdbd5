"""Whether two stores hold activations of the same tokens, row by row."""

from __future__ import annotations

from store.activation_reader import ActivationReader
from store.common import StoreError
from store.shards import Marker

_SAME = ("tokens", "keep")  # arrays whose checksums must agree


def require_same_rows(first: ActivationReader, other: ActivationReader, split: str) -> None:
    """Checks that row n of a split of both stores is the same token of the same document, and kept in both or neither.

    Compares the layout, each shard's CRC-32C of its tokens and keep mask, and the documents with the hashes of their
    texts. Raises: StoreError naming the first difference.
    """
    names = f"{first.path} and {other.path}"
    for setting in ("seq_len", "contexts_per_shard"):
        one, two = getattr(first, setting), getattr(other, setting)
        if one != two:
            raise StoreError(f"{names} do not hold the same rows: {setting} is {one} and {two}. {_REPAIR}")
    ours, theirs = first.markers(split), other.markers(split)
    if ours.keys() != theirs.keys():
        raise StoreError(
            f"{names} do not hold the same rows: they have {len(ours):,} and {len(theirs):,} {split} shards. {_REPAIR}"
        )
    for shard, marker in ours.items():
        if different := _different(marker, theirs[shard]):
            raise StoreError(
                f"{names} do not hold the same rows: {split} shard {shard} has other {different}. {_REPAIR}"
            )


_REPAIR = "Harvest both from the same text, with the same --tokens, --heldout-tokens, --seq-len and --context-bos."


def _different(one: Marker, two: Marker) -> str:
    """What differs between two shards' text; empty if nothing does."""
    if (one.contexts, one.rows) != (two.contexts, two.rows):
        return "numbers of contexts"
    for name in _SAME:
        if _checksum(one, name) != _checksum(two, name):
            return {"tokens": "tokens", "keep": "rows kept"}[name]
    if one.kept_rows != two.kept_rows:  # of a row filter
        return "rows kept"
    return "documents" if one.documents != two.documents else ""


def _checksum(marker: Marker, array: str) -> list[int]:
    """The CRC-32C of a shard's file of an array; the file's number depends on the other split's size."""
    return [entry["crc32c"] for name, entry in marker.files.items() if name.startswith(f"{array}/")]
