"""Summaries of where a crosscoder's features are: the shares of their decoder norms, and cosines between sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.sites import Site
from sae.evaluation.metrics import number

ONE_SITE_ABOVE = 0.9  # of a feature's decoder norms
SHARED_WITHIN = 0.2  # of an equal share, as a part of it: of two sites, between 0.4 and 0.6
BINS = 20


def shares_summary(shares: Float[Tensor, "alive n_sites"]) -> dict[str, Any]:
    """How many features belong to one site or to all, and the histogram of each site's share."""
    sites = shares.shape[1]
    equal = 1 / sites
    edges = np.linspace(0, 1, BINS + 1)
    return {
        "formula": "‖W_dec,i^s‖ / Σ_t ‖W_dec,i^t‖ of features that are active on held-out rows, in units where each "
        "site's mean ‖x‖² is 1 (Lindsey et al. 2024)",
        "version": 1,
        "features": len(shares),
        "one_site_above": ONE_SITE_ABOVE,
        "one_site": [int((shares[:, n] > ONE_SITE_ABOVE).sum()) for n in range(sites)],
        "shared_between": [equal * (1 - SHARED_WITHIN), equal * (1 + SHARED_WITHIN)],
        "shared": int(((shares - equal).abs() <= equal * SHARED_WITHIN).all(-1).sum()),
        "histogram": {
            "edges": edges.tolist(),
            "features": [np.histogram(shares[:, n].numpy(), edges)[0].tolist() for n in range(sites)],
        },
    }


def cosine_summary(pair: tuple[int, int], cosine: Float[Tensor, " alive"], sites: Sequence[Site]) -> dict[str, Any]:
    """The distribution of the cosine between the decoder rows of two sites."""
    defined = cosine[cosine.isfinite()].numpy()
    quantiles = np.percentile(defined, [5, 50, 95]) if len(defined) else np.full(3, np.nan)
    return {
        "sites": [sites[n].name for n in pair],
        "formula": "cosine of W_dec,i^s and W_dec,i^t; comparable where both sites have the same basis, such as layers "
        "of one residual stream or a model and its tuned copy",
        "version": 1,
        **dict(zip(("p5", "median", "p95"), map(number, quantiles), strict=True)),
    }
