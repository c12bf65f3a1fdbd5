"""What an artefact is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae.kernels import choose, device_named, matmul
from sae.pipeline.resolve import PipelineError
from store.activations import ActivationStore, is_url
from store.common import HELD_OUT, TRAIN
from store.features import FeatureIndex


def describe(path: str | Path | None = None) -> dict[str, Any]:
    """What an artefact is: a dictionary, an activation store, a feature index, a model, or a run holding them.

    Without a path, what dictionaries are computed with on this machine. Raises: PipelineError when it is none.
    """
    if path is None:
        return {"kind": "machine", "device_here": str(device_named()), **_choices_here()}
    if is_url(path):
        return _describe_store(ActivationStore.open(path))
    path = Path(path)
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text())
        if isinstance(config, dict) and config.get("kind") == "sae":
            return {"kind": "sae", **{k: v for k, v in config.items() if k != "kind"}, **_choices_here()}
        if isinstance(config, dict) and config.get("kind") == "feature-dump":
            return {**config, "kind": "feature dump (samples of another tool's dictionary, to look at)"}
        return {"kind": "model", **config}
    if path.name.endswith(".zarr") and (path / "firings").is_dir():
        found = FeatureIndex.open(path)
        return {**found.attributes, "kind": "feature index", "contexts": found.n_contexts}
    if path.name.endswith(".zarr"):
        return _describe_store(ActivationStore.open(path))
    inside = sorted(p for p in path.glob("*") if p.name.endswith(".zarr") or (p / "config.json").is_file())
    if not inside:
        raise PipelineError(f"{path}: no dictionary, activation store, feature index or model here.")
    return {"kind": "run", "holds": [p.name for p in inside]}


def _choices_here() -> dict[str, str]:
    """The kernels and dense products that `auto` takes here, and why."""
    kernels = choose(device=device_named())
    return {"kernels_here": f"{kernels.NAME}: {kernels.describe()}", "matmul_here": matmul.describe()}


def _describe_store(store: ActivationStore) -> dict[str, Any]:
    splits, disk_bytes = {}, 0
    for split in (HELD_OUT, TRAIN):
        markers = store.markers(split)
        filled = {shard: marker for shard, marker in markers.items() if marker.contexts}
        disk_bytes += sum(entry["bytes"] for marker in filled.values() for entry in marker.files.values())
        kept_rows = sum(marker.kept_rows for marker in filled.values())
        splits[split] = {
            "shards": store.n_shards[split],
            "shards_written": len(markers),
            "shards_with_rows": len(filled),
            "contexts": sum(marker.contexts for marker in filled.values()),
            "rows": sum(marker.rows for marker in filled.values()),
            "kept_rows": kept_rows,
            "documents": len({number for marker in filled.values() for number in marker.documents}),
            "hook_points": {hook: _moments(store, split, hook) for hook in store.hook_points} if kept_rows else {},
        }
    return {
        "kind": "activation store",
        "path": str(store.path),
        "format": store.attributes["format"],
        "complete": store.is_complete,
        "hook_points": {hook: {"d_in": d, "dtype": store.dtype[hook]} for hook, d in store.hook_points.items()},
        "seq_len": store.seq_len,
        "contexts_per_shard": store.contexts_per_shard,
        "ring_shards_per_lane": store.ring_shards_per_lane,
        "disk_bytes": disk_bytes,
        "splits": splits,
        "provenance": store.provenance,
    }


def _moments(store: ActivationStore, split: str, hook: str) -> dict[str, float]:
    """Of the kept rows: ‖mean‖, mean ‖x‖², and the share of it that is not the mean's (what a dictionary explains)."""
    totals = store.totals(split, hook)
    mean_sq = float((totals.mean**2).sum())
    return {
        "mean_norm": mean_sq**0.5,
        "mean_sq_norm": totals.mean_sq_norm,
        "variance_share": 1 - mean_sq / totals.mean_sq_norm if totals.mean_sq_norm else 0.0,
    }
