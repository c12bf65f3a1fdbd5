"""Brings silent JumpReLU features back: their biases rise until they pass their thresholds."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.parallel.mesh import ONE, Mesh
from sae.training.batch_topk_threshold import PATIENCE

SILENT_FOR = 4  # times 1 / min_density rows: by chance, one in 50 features of that density is silent so long


@torch.no_grad()
def raise_silent_biases_(
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
    tokens_since_fired: Int[Tensor, " d_sae"],
    rows: int,
    min_density: float,
    mesh: Mesh = ONE,
) -> None:
    """`b_enc ← b_enc + θ / PATIENCE · min_density · rows` of each feature silent for SILENT_FOR / min_density rows.

    θ is the feature's threshold, or the mean threshold if that is higher. A feature whose pre-activations all lie far
    below its threshold gets no gradient, so it would stay silent. Its bias rises by one θ in PATIENCE / min_density
    rows, until it fires and learns again.
    Source: the loss-free balancing of experts by Wang et al. 2024 (arXiv 2408.15664), as in `balanced`.
    """
    silent = tokens_since_fired * min_density >= SILENT_FOR
    unit = threshold.maximum(mesh.mean_of_features(threshold)).clamp_min(0)
    b_enc += torch.where(silent, unit * (min_density * rows / PATIENCE), 0.0)
