"""Which direction of one dictionary is which of another: best cosines, one-to-one matching, what stays alone."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from sae.dictionary.directions import best_cosines, unit


def recovery(learned: Float[Tensor, "n_learned d"], truth: Float[Tensor, "n_truth d"]) -> dict[str, float]:
    """How well learned directions are a planted dictionary.

    mmcs_truth = mean over truths of max cosine with any learned direction (the field's MMCS); mmcs_learned the other
    way round, low when directions are learned that are no truth; mcc = mean cosine over truths of the one-to-one
    matching with the largest sum (Hungarian; a truth left alone counts 0), so two features for one truth gain nothing;
    recovered = share of truths whose match has cosine > 0.9.
    Source: Sharkey et al. 2022 (MMCS); Kuhn 1955 (matching).
    """
    best = best_cosines(truth, learned)
    cosines = (unit(truth.float()) @ unit(learned.float()).T).numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    matched = cosines[rows, columns]
    return {
        "mmcs_truth": float(best.cosine_a.mean(dtype=np.float64)),
        "mmcs_learned": float(best.cosine_b.mean(dtype=np.float64)),
        "mcc": float(matched.sum(dtype=np.float64) / len(truth)),
        "recovered": float((matched > 0.9).sum() / len(truth)),
    }


def one_to_one(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The matching of largest total weight over the edges (a[e], b[e], weights[e] > 0): partner of each a, of each b.

    Every node has at most one partner; −1 where none. Exact (Jonker–Volgenant on the sparse graph, each a also offered
    to stay alone at weight 0).
    """
    partner_a, partner_b = np.full(shape[0], -1, np.int64), np.full(shape[1], -1, np.int64)
    if len(weights) == 0:
        return partner_a, partner_b
    rows, row_of = np.unique(a, return_inverse=True)  # only nodes with an edge take part
    columns, column_of = np.unique(b, return_inverse=True)
    alone = np.arange(len(rows))
    ceiling = float(weights.max()) + 1.0  # a cost of 0 would be no edge
    costs = np.concatenate([ceiling - weights, np.full(len(rows), ceiling)])
    graph = sparse.csr_array(
        (costs, (np.concatenate([row_of, alone]), np.concatenate([column_of, len(columns) + alone]))),
        shape=(len(rows), len(columns) + len(rows)),
    )
    matched, partner = min_weight_full_bipartite_matching(graph)
    real = partner < len(columns)
    partner_a[rows[matched[real]]] = columns[partner[real]]
    partner_b[columns[partner[real]]] = rows[matched[real]]
    return partner_a, partner_b
