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
from sae.parallel.mesh import ONE, Mesh

ALL_ROWS_VERSION = 1


class Inliers(NamedTuple):
    """The rows with ‖x‖ ≤ `max_norm`, and their mean (for a transcoder: y in place of x)."""

    max_norm: float
    mean: Float[np.ndarray, " d_out"]


@torch.inference_mode()
def inliers_of(
    blocks: Iterable[Block], mean: Float[np.ndarray, " d_out"], kept_tokens: int, mesh: Mesh = ONE
) -> Inliers:
    """The inliers among the kept rows of all ranks' `blocks`, which are read twice; `mean` is that of these rows."""
    norms = [block.wanted.double().norm(dim=-1)[block.keep] for block in blocks]
    everyones = [torch.from_numpy(part) for part in mesh.in_order([found.numpy() for found in norms], np.empty(0))]
    max_norm = mesh.tell(largest_ordinary_norm(torch.cat(everyones)) if everyones else float("inf"))
    beyond = int(mesh.reduce(torch.tensor(sum(int((found > max_norm).sum()) for found in norms)), "sum", "world"))
    if not beyond:
        return Inliers(max_norm, mean)
    own = []
    for block in blocks:
        x = block.wanted.double()
        own.append(x[block.keep & (x.norm(dim=-1) > max_norm)].sum(0).numpy()[None])
    inside = mean.astype(np.float64) * kept_tokens
    for outside in mesh.in_order(own, np.empty((0, len(mean)))):
        inside -= outside[0]
    return Inliers(max_norm, mesh.send_first(torch.from_numpy(inside / (kept_tokens - beyond))).numpy())


@torch.inference_mode()
def fvu_of_all_rows(
    placed: FrozenSAE, blocks: Iterable[Block], mean: Float64[np.ndarray, " d_out"], mesh: Mesh = ONE
) -> dict[str, Any]:
    """The entry of eval.json for the FVU over blocks whose `keep` leaves out BOS and padding alone, `mean` theirs."""
    own = []
    for block in blocks:
        _, x_hat = placed.reconstruct(block.acts.flatten(0, 1)[block.keep.flatten()])
        x = block.wanted[block.keep].double()
        squares = ((x - x_hat.double()).pow(2).sum(), (x - torch.from_numpy(mean)).pow(2).sum())
        own.append(np.array([[float(square) for square in squares]]))
    sums = mesh.in_order(own, np.empty((0, 2)))
    error, variance = (sum(float(part[0, i]) for part in sums) for i in (0, 1))
    return {
        "value": metrics.number(error / variance if variance else np.nan),
        "formula": "Σ‖x−x̂‖² / Σ‖x−μ‖² over all rows but BOS and padding, also those that the row filter leaves out; "
        "μ their mean",
        "version": ALL_ROWS_VERSION,
    }
