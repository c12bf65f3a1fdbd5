"""Batch-topk's thresholds while it trains: one level for all, and below it the features that would fall silent."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.activations import FeatureActs
from sae.training.config import TrainConfig

LEVEL_RATE = 0.01  # of the running mean that becomes the level
PATIENCE = 16  # a threshold has fallen from the level to zero after this many times 1 / min_density silent rows


@torch.no_grad()
def settle_(
    threshold: Float[Tensor, " d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    acts: FeatureActs,
    step: int,
    config: TrainConfig,
) -> None:
    """Moves the thresholds by what a batch kept: those of inference, and the ranks within the next batch.

    `level ← mean over batches of the least kept (f + lift)`, `threshold = level − lift`,
    `lift ← lift + level / PATIENCE · (min_density · rows − firings)`, between 0 and the level;
    what it would rise beyond the level is added to b_enc.

    A feature that fires less than on `min_density` of the rows is ranked higher until it does, gets gradients again
    and learns; its value is not changed unless it is nowhere above zero, where no rank helps. Frequent features have no
    lift. With `min_density` = 0 all share the level.
    Source: Bussmann et al. 2024 (arXiv 2412.06410), §3, for the level, E over batches of min{f : f > 0}; the lift is
    the loss-free balancing that Wang et al. 2024 (arXiv 2408.15664) found for experts.
    """
    kept = acts.sparse()
    positive = kept.values.detach() > 0
    features = kept.support.features[positive].long()
    if not len(features):
        return
    old = threshold.amax()
    lift = old - threshold
    least = (kept.values.detach()[positive] + lift[features]).min()
    level = old.lerp(least, LEVEL_RATE) if step else least
    if config.min_density:
        firings = torch.bincount(features, minlength=len(threshold))
        lift = lift + level / PATIENCE * (config.min_density * acts.n_rows - firings)
        b_enc += (lift - level).clamp_min(0)
    threshold.copy_(level - lift.clamp_min(0).clamp_max(level))
