"""Rows of a huge norm in an evaluation: the FVU without them, and with the rows that a row filter leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64

from sae.dictionary.inference import FrozenSAE
from sae.dictionary.outliers import largest_ordinary_norm
from sae.evaluation import metrics
from sae.evaluation.blocks import Block

ALL_ROWS_VERSION = 1


class Inliers(NamedTuple):
    """The rows with ‖x‖ ≤ `max_norm`, and their mean (for a transcoder: y in place of x)."""

    max_norm: float
    mean: Float[np.ndarray, " d_out"]


@torch.inference_mode()
def inliers_of(blocks: Iterable[Block], mean: Float[np.ndarray, " d_out"], kept_tokens: int) -> Inliers:
    """The inliers among the kept rows of `blocks`, which are read twice; `mean` is that of all these rows."""
    norms = [block.wanted.double().norm(dim=-1)[block.keep] for block in blocks]
    max_norm = largest_ordinary_norm(torch.cat(norms)) if norms else float("inf")
    beyond = sum(int((found > max_norm).sum()) for found in norms)
    if not beyond:
        return Inliers(max_norm, mean)
    inside = mean.astype(np.float64) * kept_tokens
    for block in blocks:
        x = block.wanted.double()
        inside -= x[block.keep & (x.norm(dim=-1) > max_norm)].sum(0).numpy()
    return Inliers(max_norm, inside / (kept_tokens - beyond))


@torch.inference_mode()
def fvu_of_all_rows(placed: FrozenSAE, blocks: Iterable[Block], mean: Float64[np.ndarray, " d_out"]) -> dict[str, Any]:
    """The entry of eval.json for the FVU over blocks whose `keep` leaves out BOS and padding alone, `mean` theirs."""
    error, variance = 0.0, 0.0
    for block in blocks:
        _, x_hat = placed.reconstruct(block.acts.flatten(0, 1)[block.keep.flatten()])
        x = block.wanted[block.keep].double()
        error += float((x - x_hat.double()).pow(2).sum())
        variance += float((x - torch.from_numpy(mean)).pow(2).sum())
    return {
        "value": metrics.number(error / variance if variance else np.nan),
        "formula": "Σ‖x−x̂‖² / Σ‖x−μ‖² over all rows but BOS and padding, also those that the row filter leaves out; "
        "μ their mean",
        "version": ALL_ROWS_VERSION,
    }
