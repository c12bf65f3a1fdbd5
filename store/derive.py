"""Stores made from stores: merged, or cut to some hook points and shards; and numpy files. Values stay exact."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from store.activation_input import differences
from store.activations import ActivationStore
from store.common import SPLITS, StoreError, can_run, explaining_full_disk, fsync, reserve
from store.schema import atomic_json, decode
from store.shards import Marker

# What a row means, in the provenance.
_SAME_ROWS = ("model", "tokenizer_sha256", "bos", "weight_processing", "rows")
Shard = tuple[ActivationStore, str, int, int]  # store, split, shard, and what is added to its document numbers


def merge(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> int:
    """Writes one store with the rows of several that have the same model, hook points and context length.

    Documents get new numbers. Returns how many documents are in more than one store (by SHA-256). After a kill, repeat
    the call to continue. Raises: StoreError showing what differs between them, or if one of them is not complete, or if
    the same document could be held out of one and trained on in another.
    """
    stores = [_complete(path) for path in paths]
    if len(stores) < 2:
        raise StoreError("merging takes at least two stores")
    first = stores[0]
    for other in stores[1:]:
        found = differences(_meaning(first), _meaning(other))
        if found:
            raise StoreError(
                f"{other.path} cannot be merged with {first.path}:\n  "
                + "\n  ".join(line.replace("this call asks for", "the other") for line in found)
            )
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    offset, seen, repeated = 0, set[str](), 0
    for store in stores:
        tables = {split: store.documents(split) for split in SPLITS}
        hashes = {entry[3] for table in tables.values() for entry in table.values()}
        repeated += len(seen & hashes)
        seen |= hashes
        for split in SPLITS:
            shards[split] += [(store, split, s, offset) for s, m in store.markers(split).items() if m.contexts]
        offset += 1 + max((number for table in tables.values() for number in table), default=-1)
    rules = sorted({str(store.provenance.get("held_out", "a rule not recorded")) for store in stores})
    if repeated and len(rules) > 1:
        raise StoreError(
            f"{repeated:,} documents are in more than one of these stores, which chose held-out text by different "
            "rules, so that text held out of one could be trained on in the other. Harvest one of them again"
        )
    joined = hashlib.sha256("\n".join(str(store.provenance.get("text_sha256")) for store in stores).encode())
    provenance = {key: value for key, value in first.provenance.items() if key in _SAME_ROWS} | {
        "held_out": "; or ".join(rules),
        "text": " + ".join(str(store.provenance.get("text")) for store in stores),
        "text_sha256": joined.hexdigest(),
        "merged_from": [store.provenance for store in stores],
    }
    _write(out, first, list(first.hook_points), shards, provenance)
    return repeated


def subset(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    hook_points: Sequence[str] | None = None,
    tokens: int | None = None,
) -> None:
    """Writes a store of some hook points, with all held-out shards and the first shards of `tokens` training tokens.

    Raises: StoreError for an unknown hook point, or a store that is not complete.
    """
    store = _complete(path)
    hooks = _chosen(store, hook_points)
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        rows = 0
        for shard, marker in store.markers(split).items():
            if marker.contexts and not (split == "train" and tokens is not None and rows >= tokens):
                shards[split].append((store, split, shard, 0))
                rows += marker.rows
    provenance = {k: v for k, v in store.provenance.items() if k != "text_specs"} | {"subset_of": store.provenance}
    _write(out, store, hooks, shards, provenance)


def export_numpy(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    hook_points: Sequence[str] | None = None,
    split: str = "train",
) -> Path:
    """Writes a split's kept rows as .npy files: `<hook point>.npy` [kept rows, d_in], row, token and document numbers.

    bfloat16, which numpy does not have, becomes float32. The directory appears once it is complete.
    Raises: StoreError if `out` exists.
    """
    store = ActivationStore.open(path)
    hooks = _chosen(store, hook_points)
    markers = {shard: marker for shard, marker in store.markers(split).items() if marker.kept_rows}
    out = Path(out)
    if out.exists():
        raise StoreError(f"{out} exists; choose another directory")
    draft = out.with_name(out.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with explaining_full_disk(out, lambda: "Nothing of it is kept; the store is unchanged."):
            _write_numpy(store, hooks, split, markers, draft)
            os.rename(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    fsync(out.parent)
    return out


def _write_numpy(store: ActivationStore, hooks: list[str], split: str, markers: dict[int, Marker], draft: Path) -> None:
    """Writes the files of `export_numpy` into `draft`."""
    n_rows = sum(marker.kept_rows for marker in markers.values())
    draft.mkdir(parents=True)
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        hook: (np.float16 if store.dtype[hook] == "float16" else np.float32, (n_rows, store.hook_points[hook]))
        for hook in hooks
    } | {"row": (np.int64, (n_rows,)), "token": (np.uint32, (n_rows,)), "document": (np.int32, (n_rows,))}
    files = {
        name: np.lib.format.open_memmap(draft / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (dtype, shape) in shapes.items()
    }
    for name in files:
        reserve(draft / f"{name}.npy")
    end = 0
    for shard, marker in markers.items():
        text = store.read_contexts(split, shard)
        keep = text.keep.reshape(-1)
        start, end = end, end + marker.kept_rows
        files["row"][start:end] = text.first_context * store.seq_len + np.flatnonzero(keep)
        files["token"][start:end] = text.tokens.reshape(-1)[keep]
        files["document"][start:end] = text.document.reshape(-1)[keep]
        for hook in hooks:
            stored = store.read_stored(split, shard, hook)[keep]
            files[hook][start:end] = decode(stored, "bfloat16") if store.dtype[hook] == "bfloat16" else stored
    for file in files.values():
        file.flush()
    about = {"split": split, "rows": n_rows, "provenance": store.provenance}
    atomic_json(draft / "about.json", about | {"documents": {str(n): d for n, d in store.documents(split).items()}})
    for entry in draft.iterdir():
        fsync(entry)


def _complete(path: str | os.PathLike[str]) -> ActivationStore:
    store = ActivationStore.open(path)
    if not store.is_complete:
        raise StoreError(f"{store.path} is not complete: repeat its harvest, or see `sae verify`")
    return store


def _meaning(store: ActivationStore) -> dict[str, Any]:
    """What must be equal in stores to be merged."""
    return {
        "hook_points": store.hook_points,
        "dtype": store.dtype,
        "seq_len": store.seq_len,
        "contexts_per_shard": store.contexts_per_shard,
        **{key: store.provenance.get(key) for key in _SAME_ROWS if key != "model"},
        "model_sha256": store.provenance.get("model", {}).get("sha256"),
    }


def _chosen(store: ActivationStore, hook_points: Sequence[str] | None) -> list[str]:
    chosen = list(hook_points or store.hook_points)
    for hook in chosen:
        if hook not in store.hook_points:
            raise StoreError(f"{store.path} has no hook point {hook!r}: it has {', '.join(store.hook_points)}")
    return chosen


def _write(
    out: str | os.PathLike[str],
    like: ActivationStore,
    hooks: list[str],
    shards: dict[str, list[Shard]],
    provenance: dict[str, Any],
) -> None:
    made = ActivationStore.create(
        out,
        hook_points={hook: like.hook_points[hook] for hook in hooks},
        seq_len=like.seq_len,
        contexts_per_shard=like.contexts_per_shard,
        n_shards={split: len(of_split) for split, of_split in shards.items()},
        dtype={hook: like.dtype[hook] for hook in hooks},
        provenance=provenance,
    )
    with explaining_full_disk(out, lambda: "Every shard written before is complete."), made.hold():
        if not can_run(like.provenance.get("model", {})):
            made.write_vocabulary(like.vocabulary())
        for split, of_split in shards.items():
            written = made.markers(split)
            for number, (store, _, shard, offset) in enumerate(of_split):
                if number in written:
                    continue
                text = store.read_contexts(split, shard)
                documents = store.marker(split, shard).documents
                made.write_shard(
                    split,
                    number,
                    acts={hook: store.read_stored(split, shard, hook) for hook in hooks},
                    tokens=text.tokens,
                    keep=text.keep,
                    document=np.where(text.document < 0, -1, text.document + offset),
                    documents={n + offset: entry for n, entry in documents.items()},
                    cursor={},
                )
        made.finish()
