"""Batch-topk's thresholds: estimated while it trains, calibrated on a sample of rows at the end.

In training they are a level for all features, and a lift that lowers some of them.

The state is one tensor, `threshold = level − lift`: inference uses it, and checkpoints hold it. Each update splits it
into the two tensors, changes each by its own rule and joins them again. They are not stored separately between steps:
`(level − lift)` rounds, so a run resumed from its checkpoint would differ in the last bits from an unbroken one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.kernels.activations import FeatureActs
from sae.parallel.mesh import ONE, Mesh
from sae.parallel.selection import kth_largest
from sae.training.config import TrainConfig

LEVEL_RATE = 0.01  # of the running mean that becomes the level
CALIBRATION_ROWS = 32_768
CALIBRATED_AT_ONCE = 1 << 23  # pre-activations in memory at once
PATIENCE = 16  # a threshold falls from the level to zero in this many times 1 / min_density silent rows


@torch.no_grad()
def update_thresholds_(
    threshold: Float[Tensor, " d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    acts: FeatureActs,
    step: int,
    config: TrainConfig,
    mesh: Mesh = ONE,
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
    level, lift = split(threshold, mesh)
    mine = (values + lift[features]).min() if len(features) else values.new_tensor(torch.inf)
    smallest = mesh.reduce(mine, "min", "world")
    if smallest == torch.inf:
        return
    begun = step > 0 or bool(level > 0)  # a run that starts from a dictionary has its level
    level = level.lerp(smallest, LEVEL_RATE) if begun else smallest
    if config.min_density:
        firings = mesh.reduce(torch.bincount(features, minlength=len(threshold)), "sum", "rows")
        lift = lift + level / PATIENCE * (config.min_density * acts.n_rows * mesh.row_groups - firings)
        b_enc += (lift - level).clamp_min(0)
    threshold.copy_(join(level, lift))


def split(threshold: Float[Tensor, " d_sae"], mesh: Mesh = ONE) -> tuple[Float[Tensor, ""], Float[Tensor, " d_sae"]]:
    """`level` and `lift`: the highest threshold, and how far below it each feature's threshold lies."""
    level = mesh.reduce(threshold.amax(), "max", "features")
    return level, level - threshold


def join(level: Float[Tensor, ""], lift: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """`threshold = level − lift`, the lift kept between 0 and the level."""
    return level - lift.clamp_min(0).clamp_max(level)


# --- at the end of training ------------------------------------------------------------------------------------------


@torch.no_grad()
def calibrated(
    sae: SAE, x: Float[Tensor, "n d_in"], min_density: float = 0.0, mesh: Mesh = ONE
) -> Float[Tensor, " d_sae"]:
    """The thresholds with which k features per row are active on x, and each on at least `min_density` of the rows.

    `thresholdᵢ = max(0, min(level, qᵢ))`: feature i is above qᵢ on `min_density` of the rows, and the level is the one
    that gives the mean L0 k. Fewer than k are active only if fewer are above 0; a feature that is above 0 on fewer rows
    than `min_density` asks for keeps all of them.
    Both lie halfway to the next value, so that another order of summation counts the same.
    The estimate of training is the mean of what k · rows of each batch need, which is not what k per row need on other
    rows: batches vary, and the weights have changed since. On a mesh x are the same rows on every rank.
    """
    assert sae.k is not None
    wanted, least = sae.k * len(x), round(min_density * len(x))
    everything = torch.arange(sae.d_sae, device=x.device)
    bar = sae.threshold.clamp_min(0.0) / 2  # a first guess of what is low enough
    values, features = _entries_above(bar, sae, x, everything)
    scarce = torch.bincount(features, minlength=sae.d_sae) <= (least or -1)
    highest = mesh.reduce(bar.amax(), "max", "features")
    scarce = (bar > 0) & (scarce | (mesh.reduce((values > highest).sum(), "sum", "features") <= wanted))
    if scarce.any():  # look at all their activations
        more, of = _entries_above(torch.zeros_like(bar), sae, x, everything[scarce])
        kept = ~scarce[features]
        values, features = torch.cat([values[kept], more]), torch.cat([features[kept], of])
    if mesh.reduce(torch.tensor(len(values)), "sum", "features") <= wanted:
        return torch.zeros_like(bar)
    own = _exceeded_by(least, values, features, sae.d_sae) if least else torch.full_like(bar, torch.inf)
    ranks = torch.where(values > own[features], torch.inf, values)  # the level below which each entry is active
    level = torch.stack([kth_largest(mesh, ranks, wanted + 1), kth_largest(mesh, ranks, wanted)]).mean()
    return torch.minimum(level, own)


def _entries_above(
    bar: Float[Tensor, " d_sae"], sae: SAE, x: Float[Tensor, "n d_in"], which: Int[Tensor, " m"]
) -> tuple[Float[Tensor, " entries"], Int[Tensor, " entries"]]:
    """The pre-activations on x of these features above their bar, and the feature of each."""
    W_enc, bias = sae.W_enc[:, which], (sae.b_enc - sae.input_bias @ sae.W_enc)[which]
    values, features = [], []
    for rows in torch.split(x, max(1, CALIBRATED_AT_ONCE // len(which))):
        pre = torch.addmm(bias, rows, W_enc)
        above = pre > bar[which]
        values.append(pre[above])
        features.append(which.expand_as(pre)[above])
    return torch.cat(values), torch.cat(features)


def _exceeded_by(
    n: int, values: Float[Tensor, " entries"], features: Int[Tensor, " entries"], d_sae: int
) -> Float[Tensor, " d_sae"]:
    """What n ≥ 1 entries of each feature exceed, halfway to the next one; 0 for a feature with no more than n."""
    order = values.sort(descending=True).indices
    order = order[features[order].sort(stable=True).indices]
    counts = torch.bincount(features, minlength=d_sae)
    last = (counts.cumsum(0) - counts + n).clamp_max(len(values) - 1)
    ordered = values[order]
    return torch.where(counts > n, (ordered[last - 1] + ordered[last]) / 2, 0.0)
