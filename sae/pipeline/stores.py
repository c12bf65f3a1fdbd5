"""Care for activation stores without a model: verify, clean, merge, subset, export as numpy arrays.

The functions of `sae verify`, `sae clean` and `sae store`. They load without torch; `repair` is in a separate module.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from sae.pipeline.errors import PipelineError
from store.activations import ActivationStore
from store.common import HELD_OUT, TRAIN, StoreError
from store.derive import export_numpy, merge, subset

__all__ = ["clean", "export_numpy", "harvested", "merge_stores", "subset_store"]

merge_stores, subset_store = merge, subset
FEW_ROWS = 1 / 2  # of those a store was to have: with fewer, training warns


def harvested(store: ActivationStore) -> str:
    """How many rows a store was to have and has, of each split, and why there are fewer, in one sentence each."""
    sentences = []
    for split, named in ((TRAIN, "for training"), (HELD_OUT, "held out")):
        markers, asked = store.markers(split), store.asked_rows(split)
        kept = sum(marker.kept_rows for marker in markers.values())
        documents = len({number for marker in markers.values() for number in marker.documents})
        said = f"{named}: asked for {asked:,} rows, got {kept:,} from {documents:,} documents"
        short, lanes = short_lanes(store, split)
        if kept >= asked or "bos" not in store.provenance:  # rows of the user's own need no reason
            pass
        elif short:
            said += "; the text has no more" if short == lanes else f"; the text ended in {short} of its {lanes} lanes"
        elif len(markers) == store.n_shards[split]:
            said += "; the rest is BOS tokens, which are not kept"
        sentences.append(said)
    return ". ".join(sentences)


def short_lanes(store: ActivationStore, split: str) -> tuple[int, int]:
    """The lanes of text whose last shard is not full, because the text ended before; and all that have a shard."""
    markers, shards, lanes = store.markers(split), store.n_shards[split], store.text_lanes[split]
    last = [range(lane, shards, lanes)[-1] for lane in range(min(lanes, shards))]
    return sum(s in markers and markers[s].contexts < store.contexts_per_shard for s in last), len(last)


def warn_of_few_rows(store: ActivationStore) -> None:
    """Warns that a finished store has far fewer rows than were asked for, or none held out."""
    if not store.is_complete:
        return
    kept = {split: sum(marker.kept_rows for marker in store.markers(split).values()) for split in (TRAIN, HELD_OUT)}
    if kept[TRAIN] < FEW_ROWS * store.asked_rows(TRAIN):
        warnings.warn(f"{store.path} has few rows. {harvested(store)}. Give a longer text for more.", stacklevel=3)
    elif not kept[HELD_OUT]:
        warnings.warn(
            f"{store.path} has no held-out rows, so `sae eval` will have nothing to measure on. Harvest into a new "
            "store: long documents are now divided between the splits.",
            stacklevel=3,
        )


def clean(path: str | Path, *, acts: bool = False, dry_run: bool = False) -> dict[str, int]:
    """Deletes what killed writers left in the activation stores at or under `path`; returns bytes by deleted path.

    With `acts` the stores themselves are deleted, provided that every dictionary next to them has a feature index,
    which needs no store. With `dry_run` nothing is deleted.
    Raises: StoreError when another process writes a store; PipelineError if there is no store, or a dictionary has no
    index.
    """
    path = Path(path)
    stores = [path] if _is_store(path) else sorted(p for p in path.glob("**/*.zarr") if _is_store(p))
    if not stores:
        raise PipelineError(f"{path}: no activation store (*.zarr) here or below, so nothing to clean.")
    deleted: dict[str, int] = {}
    for place in stores:
        store = ActivationStore.open(place)
        with store.hold(sweep=False):
            if acts:
                _require_indexes(place)
                deleted[str(place)] = _bytes_under(place)
                if not dry_run:
                    shutil.rmtree(place)
            else:
                deleted |= {store.place.where(key): size for key, size in store.sweep(dry_run=dry_run).items()}
        for beside in (place.with_name(place.name + ".creating"), place.with_name(place.name + ".lock")):
            if beside.exists():
                deleted[str(beside)] = _bytes_under(beside)
                if not dry_run:
                    shutil.rmtree(beside) if beside.is_dir() else beside.unlink()
    return deleted


def _is_store(path: Path) -> bool:
    try:
        ActivationStore.open(path)
    except StoreError:
        return False
    return True


def _require_indexes(store: Path) -> None:
    for config in sorted(store.parent.glob("**/config.json")):
        if (config.parent / "sae.safetensors").exists() and not (config.parent / "features.zarr").is_dir():
            raise PipelineError(
                f"{config.parent} has no feature index yet, and building one needs {store}. "
                f"Run `sae index {config.parent}` first."
            )


def _bytes_under(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def verify(path: str | Path) -> list[str]:
    """Checks every checksum of an activation store; returns the problems as sentences."""
    return [problem.text for problem in ActivationStore.open(path).verify()]
