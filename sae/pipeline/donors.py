"""Training rows that take the place of others: of resample ablation and of random pairs."""

from __future__ import annotations

import numpy as np
import torch

from sae.pipeline.errors import PipelineError
from store.activation_reader import ActivationReader
from store.common import TRAIN

DONORS, DONOR_SHARDS = 4096, 8


def donors(store: ActivationReader, hook_point: str) -> torch.Tensor:
    """Training rows for resample ablation, from the first shards: documents are stored in a random order."""
    rows: list[np.ndarray] = []
    for shard in sorted(store.markers(TRAIN))[:DONOR_SHARDS]:
        kept = store.read_contexts(TRAIN, shard).keep.reshape(-1)
        if kept.any():
            rows.append(store.read_acts(TRAIN, shard, hook_point)[kept])
    if not rows:
        raise PipelineError(f"{store.path} holds no training rows yet; finish the harvest.")
    pool = np.concatenate(rows)
    chosen = np.random.default_rng(0).permutation(len(pool))[:DONORS]
    return torch.from_numpy(pool[chosen])
