"""Batch-topk's thresholds while it trains: a level for all features, and a lift that lowers some of them.

The state is one tensor, `threshold = level − lift`: inference uses it, and checkpoints hold it. Each update splits it
into the two tensors, changes each by its own rule and joins them again. They are not stored separately between steps:
`(level − lift)` rounds, so a run resumed from its checkpoint would differ in the last bits from an unbroken one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.activations import FeatureActs
from sae.training.config import TrainConfig

LEVEL_RATE = 0.01  # of the running mean that becomes the level
PATIENCE = 16  # a threshold falls from the level to zero in this many times 1 / min_density silent rows


@torch.no_grad()
def update_thresholds_(
    threshold: Float[Tensor, " d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    acts: FeatureActs,
    step: int,
    config: TrainConfig,
) -> None:
    """Updates the thresholds, for inference and for the ranks within the next batch, from the activations of a batch.

    `level ← mean over batches of the smallest active (f + lift)`,
    `lift ← lift + level / PATIENCE · (min_density · rows − firings)`, between 0 and the level;
    `threshold = level − lift`. The part of a lift above the level is added to b_enc.

    A feature that fires on less than `min_density` of the rows gets a ranking bonus (its lift) until it fires again,
    gets gradients and learns. Its activations do not change, unless it is nowhere above zero, where no bonus helps and
    its bias rises. Features that fire often have no lift. With `min_density` = 0 all share the level.
    Source: Bussmann et al. 2024 (arXiv 2412.06410), §3, for the level, E over batches of min{f : f > 0}; the lift is
    the loss-free balancing of experts by Wang et al. 2024 (arXiv 2408.15664).
    """
    sparse = acts.sparse()
    active = sparse.values.detach() > 0
    values, features = sparse.values.detach()[active], sparse.support.features[active].long()
    if not len(features):
        return
    level, lift = split(threshold)
    smallest = (values + lift[features]).min()
    level = level.lerp(smallest, LEVEL_RATE) if step else smallest
    if config.min_density:
        lift = lift + level / PATIENCE * missing_firings(features, acts.n_rows, len(threshold), config.min_density)
        b_enc += (lift - level).clamp_min(0)
    threshold.copy_(join(level, lift))


def split(threshold: Float[Tensor, " d_sae"]) -> tuple[Float[Tensor, ""], Float[Tensor, " d_sae"]]:
    """`level` and `lift`: the highest threshold, and how far below it each feature's threshold lies."""
    level = threshold.amax()
    return level, level - threshold


def join(level: Float[Tensor, ""], lift: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """`threshold = level − lift`, the lift kept between 0 and the level."""
    return level - lift.clamp_min(0).clamp_max(level)


def missing_firings(
    features: Int[Tensor, " nnz"], n_rows: int, d_sae: int, min_density: float
) -> Float[Tensor, " d_sae"]:
    """`min_density · rows − firings` of each feature; negative for features that fire often enough."""
    return min_density * n_rows - torch.bincount(features, minlength=d_sae)
