"""The sums that the metrics of `metrics.METRICS` are ratios of, context by context and domain by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sae.evaluation import metrics
from sae.evaluation.blocks import Block, EvaluatedBlock
from sae.evaluation.outliers import Inliers
from sae.parallel.mesh import Mesh


class RatioMetrics:
    """Accumulator of `metrics` and `by_domain`: every metric of METRICS over all contexts and in each domain.

    The sums are kept for each context (which the bootstrap resamples) and each domain that the context has.
    """

    def __init__(
        self, domains: Sequence[str], heldout_mean: Float[np.ndarray, " d_out"], inliers: Inliers | None = None
    ) -> None:
        self.domains = list(domains)
        self._inliers = inliers or Inliers(np.inf, heldout_mean)
        self._mean = torch.from_numpy(heldout_mean.astype(np.float32))
        self._n_contexts: list[int] = []  # of each block, as everything here
        self._context: list[np.ndarray] = []  # numbered from 0 in each block
        self._domain: list[np.ndarray] = []
        self._sums: dict[str, list[np.ndarray]] = {name: [] for name in metrics.SUMS}

    def add(self, evaluated: EvaluatedBlock) -> None:
        domain = evaluated.block.domain
        context, cells, _ = self._cells(domain)
        self._context.append(context)
        self._domain.append(cells % len(self.domains))
        self._n_contexts.append(len(domain))
        self.add_sums(evaluated.block, position_sums(evaluated, self._mean, self._inliers))

    def add_sums(self, block: Block, values: Mapping[str, Float64[np.ndarray, "contexts pos"]]) -> None:
        """Adds to some of the sums; a second pass goes over the same blocks in the same order."""
        known = block.domain >= 0
        _, cells, cell = self._cells(block.domain)
        for name, each in values.items():
            self._sums[name].append(np.bincount(cell, each[known], minlength=len(cells)))

    def _cells(self, domain: Int[np.ndarray, "contexts pos"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of context and domain in a block: contexts, pairs as numbers, and each position's pair."""
        known = domain >= 0
        context = np.broadcast_to(np.arange(len(domain))[:, None], known.shape)[known]
        cells, cell = np.unique(context * len(self.domains) + domain[known], return_inverse=True)
        return cells // len(self.domains), cells, cell

    def l0(self, mesh: Mesh) -> float:
        """The dictionary's L0 on the blocks so far of all ranks; 0 without a token. Sums of counts are exact."""
        own = [sum((float(part.sum()) for part in self._sums[name]), 0.0) for name in ("l0", "rows")]
        active, rows = mesh.reduce(torch.tensor(own, dtype=torch.float64), "sum", "world").tolist()
        return float(active / max(rows, 1))

    def gather(self, mesh: Mesh) -> None:
        numbers = np.empty(0, np.int64)
        self._n_contexts = np.concatenate(
            [numbers, *mesh.in_order([np.array([n]) for n in self._n_contexts], numbers)]
        ).tolist()
        self._context, self._domain = mesh.in_order(self._context, numbers), mesh.in_order(self._domain, numbers)
        self._sums = {name: mesh.in_order(parts, np.empty(0)) for name, parts in self._sums.items()}

    def result(self) -> dict[str, Any]:
        starts, n_contexts = np.cumsum([0, *self._n_contexts[:-1]]), sum(self._n_contexts)
        numbered = [part + start for part, start in zip(self._context, starts, strict=False)]
        context, domain = (np.concatenate([np.empty(0, np.int64), *part]) for part in (numbered, self._domain))
        # Without a model nothing was added to the sums of its losses.
        sums = {name: np.concatenate(parts) for name, parts in self._sums.items() if parts}
        sums = sums or {name: np.empty(0) for name in metrics.SUMS}
        by_context = {name: np.bincount(context, part, minlength=n_contexts) for name, part in sums.items()}
        bootstrap = metrics.Bootstrap(n_contexts)
        groups = metrics.by_group(sums, context, domain, len(self.domains), bootstrap)
        tokens = np.bincount(domain, sums["rows"], minlength=len(self.domains))
        return {
            "metrics": metrics.summarise(by_context),
            "by_domain": {
                name: {"tokens": int(n), **group} for name, n, group in zip(self.domains, tokens, groups, strict=True)
            },
        }


def position_sums(
    evaluated: EvaluatedBlock, heldout_mean: Float[Tensor, " d_out"], inliers: Inliers
) -> dict[str, Float64[np.ndarray, "contexts pos"]]:
    """What each position adds to those of `metrics.SUMS` that a dictionary changes, or its losses."""
    block = evaluated.block
    x, x_hat = block.wanted.double(), evaluated.x_hat.double()
    dot, norm, norm_hat = (x * x_hat).sum(-1), x.norm(dim=-1), x_hat.norm(dim=-1)
    error, variance = (x - x_hat).pow(2).sum(-1), (x - heldout_mean.double()).pow(2).sum(-1)
    inlier = norm <= inliers.max_norm
    inlier_mean = torch.from_numpy(inliers.mean.astype(np.float32)).double()
    of_rows = {
        "rows": torch.ones_like(dot),
        "l0": evaluated.fired.support.offsets.diff().view(block.keep.shape).double(),
        "error": error,
        "variance": variance,
        "inlier_rows": inlier.double(),
        "inlier_error": torch.where(inlier, error, 0.0),
        "inlier_variance": torch.where(inlier, (x - inlier_mean).pow(2).sum(-1), 0.0),
        "outlier_variance": torch.where(inlier, 0.0, variance),
        "cosine": dot / (norm * norm_hat).clamp_min(1e-12),
        "hat_hat": norm_hat.pow(2),
        "x_hat": dot,
        "norm": norm,
        "norm_hat": norm_hat,
    }
    # Without a model there are no losses, and no predictions to count.
    of_predictions = {"predictions": torch.ones_like(dot), **evaluated.losses} if evaluated.losses else {}
    return counted(block, of_rows, of_predictions)


def counted(
    block: Block, of_rows: Mapping[str, Tensor], of_predictions: Mapping[str, Tensor]
) -> dict[str, Float64[np.ndarray, "contexts pos"]]:
    """The values at the positions that count, zero elsewhere.

    A position counts when it is kept; for the losses, when the token that it predicts is kept as well.
    """
    keep = block.keep
    predicts = keep & torch.nn.functional.pad(keep[:, 1:], (0, 1))
    return {
        **{name: torch.where(keep, value, 0.0).double().numpy() for name, value in of_rows.items()},
        **{name: torch.where(predicts, value, 0.0).double().numpy() for name, value in of_predictions.items()},
    }
