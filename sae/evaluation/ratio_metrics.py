"""The sums that the metrics of `metrics.METRICS` are ratios of, context by context and domain by domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae.evaluation import metrics
from sae.evaluation.blocks import EvaluatedBlock


class RatioMetrics:
    """Accumulator of `metrics` and `by_domain`: every metric of METRICS over all contexts and in each domain.

    The sums are kept for each context (which the bootstrap resamples) and each domain that the context has.
    """

    def __init__(self, domains: Sequence[str], heldout_mean: Float[np.ndarray, " d_out"]) -> None:
        self.domains = list(domains)
        self._mean = torch.from_numpy(heldout_mean.astype(np.float32))
        self._n_contexts = 0
        self._context: list[np.ndarray] = []
        self._domain: list[np.ndarray] = []
        self._sums: dict[str, list[np.ndarray]] = {name: [] for name in metrics.SUMS}

    def add(self, evaluated: EvaluatedBlock) -> None:
        domain = evaluated.block.domain
        known = domain >= 0
        context = np.broadcast_to(np.arange(len(domain))[:, None], known.shape)[known]
        cells, cell = np.unique(context * len(self.domains) + domain[known], return_inverse=True)
        self._context.append(cells // len(self.domains) + self._n_contexts)
        self._domain.append(cells % len(self.domains))
        self._n_contexts += len(domain)
        for name, values in position_sums(evaluated, self._mean).items():
            self._sums[name].append(np.bincount(cell, values[known], minlength=len(cells)))

    def result(self) -> dict[str, Any]:
        context, domain = (np.concatenate([np.empty(0, np.int64), *part]) for part in (self._context, self._domain))
        sums = {name: np.concatenate([np.empty(0), *parts]) for name, parts in self._sums.items()}
        by_context = {name: np.bincount(context, part, minlength=self._n_contexts) for name, part in sums.items()}
        bootstrap = metrics.Bootstrap(self._n_contexts)
        groups = metrics.by_group(sums, context, domain, len(self.domains), bootstrap)
        tokens = np.bincount(domain, sums["rows"], minlength=len(self.domains))
        return {
            "metrics": metrics.summarise(by_context),
            "by_domain": {
                name: {"tokens": int(n), **group} for name, n, group in zip(self.domains, tokens, groups, strict=True)
            },
        }


def position_sums(
    evaluated: EvaluatedBlock, heldout_mean: Float[Tensor, " d_out"]
) -> dict[str, Float64[np.ndarray, "contexts pos"]]:
    """What each position adds to each of `metrics.SUMS`: zero where it does not count.

    A position counts when it is kept; for the losses, when the token that it predicts is kept as well.
    """
    block, losses = evaluated.block, evaluated.losses
    keep = block.keep
    predicts = keep & torch.nn.functional.pad(keep[:, 1:], (0, 1))
    x, x_hat = block.wanted.double(), evaluated.x_hat.double()
    dot, norm, norm_hat = (x * x_hat).sum(-1), x.norm(dim=-1), x_hat.norm(dim=-1)
    of_rows = {
        "rows": torch.ones_like(dot),
        "l0": evaluated.fired.support.offsets.diff().view(keep.shape).double(),
        "error": (x - x_hat).pow(2).sum(-1),
        "variance": (x - heldout_mean.double()).pow(2).sum(-1),
        "cosine": dot / (norm * norm_hat).clamp_min(1e-12),
        "hat_hat": norm_hat.pow(2),
        "x_hat": dot,
        "norm": norm,
        "norm_hat": norm_hat,
    }
    of_predictions = {"predictions": torch.ones_like(dot), **{name: loss.double() for name, loss in losses.items()}}
    return {
        **{name: torch.where(keep, value, 0.0).numpy() for name, value in of_rows.items()},
        **{name: torch.where(predicts, value, 0.0).numpy() for name, value in of_predictions.items()},
    }
