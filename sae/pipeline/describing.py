"""What an artefact is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae.documents import HELD_OUT, TRAIN
from sae.kernels import choose, device_named, matmul
from sae.pipeline.pairing import PipelineError
from store.activations import ActivationStore
from store.features import FeatureIndex


def describe(path: str | Path) -> dict[str, Any]:
    """What an artefact is: a dictionary, an activation store, a feature index, a model, or a run holding them.

    Raises: PipelineError when it is none.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text())
        if isinstance(config, dict) and config.get("kind") == "sae":
            kernels = choose(device=device_named())
            here = {"kernels_here": f"{kernels.NAME}: {kernels.describe()}", "matmul_here": matmul.describe()}
            return {"kind": "sae", **{k: v for k, v in config.items() if k != "kind"}, **here}
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


def _describe_store(store: ActivationStore) -> dict[str, Any]:
    splits = {}
    for split in (HELD_OUT, TRAIN):
        markers = store.markers(split)
        splits[split] = {
            "shards": f"{len(markers)} of {store.n_shards[split]}",
            "kept_rows": sum(marker.kept_rows for marker in markers.values()),
        }
    return {
        "kind": "activation store",
        "complete": store.is_complete,
        "hook_points": store.hook_points,
        "dtype": store.dtype,
        "seq_len": store.seq_len,
        "splits": splits,
        "provenance": store.provenance,
    }
