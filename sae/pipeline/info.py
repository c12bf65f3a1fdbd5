"""Describe an artefact, one feature of an index, or this machine.

Only the description of this machine imports torch; artefacts are described without it, so at once.
"""

from __future__ import annotations

import json
import os
import platform
import unicodedata
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sae import __version__
from sae.pipeline.errors import PipelineError
from sae.pipeline.stores import harvested
from store.activations import ActivationStore, is_url
from store.common import HELD_OUT, TRAIN
from store.features import FeatureIndex

EXPECTED = (
    "Expected the directory of a dictionary or a model (they hold a config.json), an activation store or a feature "
    "index (*.zarr), or a directory that holds some of these"
)
BEFORE, AFTER = 12, 6  # tokens shown around a firing
N_EXAMPLES, N_TOKENS = 12, 8


def describe(path: str | Path | None = None) -> dict[str, Any]:
    """Describes a dictionary, an activation store, a feature index, a model, or a run that holds them.

    Without a path: this machine, and the kernels that `auto` chooses on it.
    Raises: PipelineError for a path that holds none of these, or a damaged config.json; StoreError for a damaged store.
    """
    if path is None:
        return dict(machine_facts())
    if is_url(path):
        return _describe_store(ActivationStore.open(path))
    path = Path(path)
    if path.is_file():
        raise PipelineError(f"{path} is a file. {EXPECTED}. To describe its directory: sae info {path.parent}")
    if not path.exists():
        raise PipelineError(f"{path}: no such file or directory. {EXPECTED}.")
    if (path / "config.json").is_file():
        return _describe_config(path / "config.json")
    if path.name.endswith(".zarr"):
        return _describe_index(path) if (path / "firings").is_dir() else _describe_store(ActivationStore.open(path))
    return _describe_run(path)


def machine_facts() -> Iterator[tuple[str, str]]:
    """What dictionaries are computed with on this machine, as (name, value): first what is known without importing
    torch."""
    yield "kind", "machine"
    yield "monosem", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "cores", str(os.cpu_count())
    for package in ("torch", "numpy", "zarr"):
        yield package, version(package)

    from sae.kernels import choose, device_named, matmul

    device = device_named()
    yield "device_here", str(device)
    kernels = choose(device=device)
    yield "kernels_here", f"{kernels.NAME}: {kernels.describe()}"
    yield "matmul_here", matmul.describe(device)


def _describe_config(file: Path) -> dict[str, Any]:
    """A dictionary, another tool's feature pages, or a model, as its config.json says."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PipelineError(
            f"{file} is not JSON ({error}): an empty or damaged file. Run the command that wrote it again."
        ) from error
    if not isinstance(config, dict):
        raise PipelineError(f"{file}: expected a JSON object, got {type(config).__name__}.")
    if config.get("kind") == "feature-dump":
        return {**config, "kind": "feature dump (samples of another tool's dictionary, to look at)"}
    return {"kind": "model", **config}


def _describe_index(path: Path) -> dict[str, Any]:
    found = FeatureIndex.open(path)
    return {**found.attributes, "kind": "feature index", "contexts": found.n_contexts}


def _describe_run(path: Path) -> dict[str, Any]:
    """The artefacts of a run, or the runs of a directory."""
    for kind, pattern in (("run", "*"), ("directory of runs", "*/*")):
        inside = sorted(p for p in path.glob(pattern) if p.name.endswith(".zarr") or (p / "config.json").is_file())
        if inside:
            return {"kind": kind, "holds": [str(p.relative_to(path)) for p in inside]}
    raise PipelineError(f"{path} holds no dictionary, activation store, feature index or model. {EXPECTED}.")


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
            "asked_rows": store.asked_rows(split),
            "kept_rows": kept_rows,
            "documents": len({number for marker in filled.values() for number in marker.documents}),
            "hook_points": {hook: _moments(store, split, hook) for hook in store.hook_points} if kept_rows else {},
        }
    return {
        "kind": "activation store",
        "path": str(store.path),
        "format": store.attributes["format"],
        "complete": store.is_complete,
        "harvested": harvested(store),
        "hook_points": {hook: {"d_in": d, "dtype": store.dtype[hook]} for hook, d in store.hook_points.items()},
        "seq_len": store.seq_len,
        "contexts_per_shard": store.contexts_per_shard,
        "ring_shards_per_lane": store.ring_shards_per_lane,
        "disk_bytes": disk_bytes,
        "splits": splits,
        "provenance": store.provenance,
    }


def _moments(store: ActivationStore, split: str, hook: str) -> dict[str, float | None]:
    """‖mean‖ and mean ‖x‖² of the kept rows, and the share of the latter that is variance around the mean: the part
    that a dictionary has to explain; L0 and participation ratio of the entries themselves."""
    totals = store.totals(split, hook)
    mean_sq = float((totals.mean**2).sum())
    return {
        "mean_norm": mean_sq**0.5,
        "mean_sq_norm": totals.mean_sq_norm,
        "variance_share": 1 - mean_sq / totals.mean_sq_norm if totals.mean_sq_norm else 0.0,
        "units_l0": totals.units_l0,
        "units_participation_ratio": totals.units_participation_ratio,
    }


def describe_feature(path: str | Path, feature: int) -> dict[str, Any]:
    """What a feature of the dictionary (or its features.zarr) at `path` fires on, raises and lowers.

    `examples` are the strongest firings, one for each context: activation, domain, text before, token, text after.
    Control characters and incomplete characters are shown as escapes.
    Raises: StoreError without an index; PipelineError for a feature that does not exist.
    """
    path = Path(path)
    index = FeatureIndex.open(path if path.name.endswith(".zarr") else path / "features.zarr")
    if not 0 <= feature < index.d_sae:
        raise PipelineError(f"{path}: feature {feature} does not exist; features are 0 … {index.d_sae - 1:,}.")
    rows, values = index.firings(feature)
    density = index.stats["density"][feature] if index.sampled else len(rows) / max(1, index.kept_tokens)
    ids, counts = np.unique(index.tokens_of(rows), return_counts=True)
    usual = np.lexsort((ids, -counts))[:N_TOKENS]
    found: dict[str, Any] = {
        "feature": feature,
        "density": float(density),
        "firings in the samples" if index.sampled else "firings": len(rows),
        "max": float(values.max()) if len(rows) else 0.0,
        "fires_on": {visible(index.token_bytes(int(ids[i]))): float(counts[i] / len(rows)) for i in usual},
    }
    for side, name in (("top", "raises"), ("bottom", "lowers")):
        if index.has(f"logits/{side}_id"):
            pairs = index.logit_weights(side, feature)[:N_TOKENS]
            found[name] = {visible(index.token_bytes(i)): weight for i, weight in pairs}
    order = np.argsort(-values, kind="stable")
    _, first = np.unique(rows[order] // index.seq_len, return_index=True)
    strongest = order[np.sort(first)[:N_EXAMPLES]]
    found["examples"] = [_example(index, int(rows[i]), float(values[i])) for i in strongest]
    return found


def _example(index: FeatureIndex, row: int, value: float) -> dict[str, Any]:
    window = index.window(row, BEFORE, AFTER)
    hit = window.position - window.start
    if index.rows:  # rows of arrays have names, and their tokens may be numbers
        document, token = index.document_of(row), visible(index.token_bytes(int(window.token_ids[hit])))
        name = visible(f"{document.id}  {index.row_name(row)}  ".encode())
        return {"activation": value, "domain": document.domain, "before": name, "token": token, "after": ""}
    tokens = [index.token_bytes(int(token)) for token in window.token_ids]
    parts = (tokens[:hit], tokens[hit : hit + 1], tokens[hit + 1 :])
    before, token, after = (visible(b"".join(part)) for part in parts)
    return {"activation": value, "domain": index.document_of(row)[2], "before": before, "token": token, "after": after}


def visible(raw: bytes) -> str:
    r"""Bytes as text that cannot control a terminal: `\n`, `\x1b`, `\u202e` and broken UTF-8 as escapes."""
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(
        each.encode("unicode_escape").decode() if unicodedata.category(each)[0] in "CZ" and each != " " else each
        for each in text
    )
