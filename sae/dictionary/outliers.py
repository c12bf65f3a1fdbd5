"""Rows of a huge norm, and the share of the variance that they carry: figures may be about them alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

NORM_MULTIPLE = 10.0  # of the median norm: a row beyond it is an outlier
NOTABLE_VARIANCE_SHARE = 0.1
ROWS_AT_ONCE = 1024


class Outliers(NamedTuple):
    """Rows with ‖x‖ > `max_norm` = 10 · median ‖x‖: their share of the rows, and of Σ‖x − μ‖², μ the mean row."""

    max_norm: float
    share_of_rows: float
    share_of_variance: float

    @property
    def notable(self) -> bool:
        """Whether they decide figures such as the FVU."""
        return self.share_of_variance > NOTABLE_VARIANCE_SHARE

    def __str__(self) -> str:
        return (
            f"{self.share_of_rows:.2%} of the rows carry {self.share_of_variance:.0%} of the variance (their norms are "
            f"above {NORM_MULTIPLE:g} times the median)"
        )


def largest_ordinary_norm(norms: Float[Tensor, " n"]) -> float:
    """10 · median norm; infinite where the median is 0, since then it says nothing."""
    median = float(np.median(norms.numpy(force=True)))
    return NORM_MULTIPLE * median if median > 0 else float("inf")


def outliers_among(rows: Float[Tensor, "n width"]) -> Outliers:
    """The outliers of a sample of rows. In parts, because its copy in float64 could be the peak memory of a run."""
    parts = torch.split(rows, ROWS_AT_ONCE)
    norms = torch.cat([part.double().norm(dim=-1) for part in parts])
    mean = sum((part.double().sum(0) for part in parts), torch.zeros(rows.shape[1], dtype=torch.float64)) / len(rows)
    variance = torch.cat([(part.double() - mean).pow(2).sum(-1) for part in parts])
    max_norm = largest_ordinary_norm(norms)
    beyond = norms > max_norm
    total = float(variance.sum())
    return Outliers(max_norm, float(beyond.double().mean()), float(variance[beyond].sum()) / total if total else 0.0)
