"""Dictionaries made from stores, and handed to other tools."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae import recipes, training
from sae.checkpoint import read_tensors
from sae.config import TrainConfig
from sae.documents import TRAIN
from sae.interop import saelens
from sae.model import SAE, save
from sae.pipeline.pairing import PipelineError, opened
from sae.rows import Batch, Rows
from store.activations import ActivationStore
from store.batches import ShuffledRows
from store.features import FeatureIndex

EXPORT_FORMATS = ("native", "sae-lens")


class StoreRows:
    """Training rows from an activation store."""

    def __init__(self, store: ActivationStore, hook_point: str, *, batch_tokens: int, seed: int) -> None:
        self._rows = ShuffledRows(store, hook_point, batch_rows=batch_tokens, seed=seed)
        self.d_in, self.n_rows = self._rows.d_in, self._rows.n_rows

    def batch(self, step: int) -> Batch:
        return Batch(torch.from_numpy(self._rows.batch(step)))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        return torch.from_numpy(self._rows.sample(min(n, self.n_rows), seed))


def train(
    rows: str | Path | Rows,
    out: str | Path,
    *,
    recipe: str = "topk",
    d_sae: int = 4096,
    tokens: int | None = None,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    hook_point: str | None = None,
    kernels: str = "auto",
    device: str = "auto",
) -> SAE:
    """Trains a dictionary on a store (its path) or any `Rows`; `config` overrides the recipe's settings.

    `tokens` is the number of rows seen (default: four epochs of a store, 4M of other rows).
    Repeat the call to go on after an interruption: the result is the same bit for bit.
    Raises: ValueError for wrong settings, before any work; Interrupted on Ctrl-C or SIGTERM.
    """
    overrides = {"d_sae": d_sae, "seed": seed, **(config or {})}
    tokens = overrides.pop("tokens", tokens)
    if not isinstance(rows, str | Path):
        _, resolved = recipes.resolve(recipe, tokens=tokens or TrainConfig.tokens, **overrides)
        return training.train(rows, out, resolved, kernels=kernels, device=device)
    store = ActivationStore.open(rows)
    hook = _hook_point(store, hook_point)
    kept_rows = store.totals(TRAIN, hook).kept_rows
    _, resolved = recipes.resolve(recipe, tokens=tokens or 4 * kept_rows, **overrides)
    source = StoreRows(store, hook, batch_tokens=resolved.batch_tokens, seed=resolved.seed)
    provenance = {
        "hook_point": hook,
        "model": store.provenance["model"],
        "store": {
            "path": os.path.relpath(store.path, out),
            "tokenizer_sha256": store.provenance["tokenizer_sha256"],
            "text": store.provenance["text"],
            "text_sha256": store.provenance["text_sha256"],
            "kept_rows": kept_rows,
        },
    }
    return training.train(source, out, resolved, provenance=provenance, kernels=kernels, device=device)


def _hook_point(store: ActivationStore, asked: str | None) -> str:
    names = list(store.hook_points)
    if asked is None and len(names) == 1:
        return names[0]
    if asked not in names:
        raise PipelineError(f"{store.path} holds the hook points {', '.join(names)}; got {asked!r}. Name one of them.")
    return asked


def export(sae: SAE | str | Path, format: str, out: str | Path) -> Path:
    """Writes the dictionary as safetensors: `native` (sae.safetensors + config.json) or `sae-lens` (SAELens' layout).

    Raises: PipelineError for an unknown format or an `out` that already holds files.
    """
    dictionary, _ = opened(sae)
    out = Path(out)
    if format not in EXPORT_FORMATS:
        raise PipelineError(f"export: format must be one of {', '.join(EXPORT_FORMATS)}; got {format!r}.")
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise PipelineError(f"export: {out} is {'a file' if out.is_file() else 'not empty'}; choose another --out.")
    if format == "sae-lens":
        return saelens.write(dictionary, out)
    return save(dictionary, out, dictionary.config)


def feature_max(directory: str | Path) -> np.ndarray:
    """Largest held-out activation of each feature, from feature_stats.safetensors (written by evaluate)."""
    return _held_out_stats(Path(directory))["max"].numpy()


def feature_units(directory: str | Path) -> dict[str, np.ndarray]:
    """What steering measures values in, `feature_max` and `feature_p99` [d_sae]: over the tokens of the feature index,
    as the browser shows them; without an index over the held-out tokens of `evaluate`.

    Raises: PipelineError where there is neither.
    """
    directory = Path(directory)
    if (directory / "features.zarr").is_dir():
        stats = FeatureIndex.open(directory / "features.zarr").stats
        return {"feature_max": stats["max"], "feature_p99": stats["p99"]}
    held_out = _held_out_stats(directory)
    return {f"feature_{name}": held_out[name].numpy() for name in ("max", "p99")}


def _held_out_stats(directory: Path) -> dict[str, Tensor]:
    path = directory / "feature_stats.safetensors"
    if not path.is_file():
        raise PipelineError(f"{path} is missing; `sae eval {directory}` writes it.")
    return read_tensors(path)[0]
