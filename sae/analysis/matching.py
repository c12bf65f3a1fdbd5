"""Matches the directions of two dictionaries, and measures how many planted directions are recovered."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from sae.dictionary.directions import best_cosines, unit


def recovery(learned: Float[Tensor, "n_learned d"], truth: Float[Tensor, "n_truth d"]) -> dict[str, float]:
    """How well learned directions recover a planted dictionary.

    mmcs_truth: mean over truths of the largest cosine with any learned direction (what the field calls MMCS).
    mmcs_learned: mean over learned directions of the largest cosine with any truth; low if many learned
    directions were not planted.
    mcc: mean over truths of the cosine in the one-to-one matching with the largest sum (Hungarian algorithm; a truth
    without partner counts 0), so that learning one truth twice gains nothing.
    recovered: share of truths whose partner has a cosine above 0.9.
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


def tracked(learned: Float[Tensor, "n_learned d"], truth: Float[Tensor, "n_truth d"]) -> Int[np.ndarray, " n_learned"]:
    """The truth that each learned direction tracks: that of the largest absolute cosine."""
    return (unit(learned.float()) @ unit(truth.float()).T).abs().argmax(1).numpy()


def synthetic_bench(
    W_dec: Float[Tensor, "n_learned d"],
    fired: sparse.csr_array,
    truth: Float[Tensor, "n_truth d"],
    on: sparse.csr_array,
) -> dict[str, float]:
    """The scores of SynthSAEBench of a dictionary on rows whose true features are known.

    bench_f1, bench_precision, bench_recall: means over all features of the scores of "the feature fires" for "the
    truth that it tracks is active", each 0 where it is undefined (a feature that never fires).
    bench_mcc: mean |cosine| of the pairs of the one-to-one matching with the largest sum, over as many pairs as the
    smaller of both dictionaries has directions.
    uniqueness: share of the features that would remain if of those that track the same truth one were kept.
    `fired` [rows, n_learned] and `on` [rows, n_truth] have an entry above 0 where a feature or a truth is active.
    Source: Chanin and Garriga-Alonso 2026 (arXiv 2602.14687); MCC: O'Neill et al. 2025 (arXiv 2505.20254).
    """
    tracks = tracked(W_dec, truth)
    fires, active = (matrix.astype(bool).astype(np.int64) for matrix in (fired, on))
    hits = fires.multiply(active[:, tracks]).sum(0)
    precision = hits / np.maximum(fires.sum(0), 1)
    recall = hits / np.maximum(active.sum(0)[tracks], 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    cosines = (unit(W_dec.float()) @ unit(truth.float()).T).abs().double().numpy()
    pairs = linear_sum_assignment(cosines, maximize=True)
    return {
        "bench_f1": float(f1.mean()),
        "bench_precision": float(precision.mean()),
        "bench_recall": float(recall.mean()),
        "bench_mcc": float(cosines[pairs].mean()),
        "uniqueness": len(np.unique(tracks)) / len(tracks),
    }


def one_to_one(
    a: Int[np.ndarray, " edges"],
    b: Int[np.ndarray, " edges"],
    weights: Float[np.ndarray, " edges"],
    shape: tuple[int, int],
) -> tuple[Int[np.ndarray, " n_a"], Int[np.ndarray, " n_b"]]:
    """The matching with the largest total weight over the edges (a[e], b[e]) with weights[e] > 0.

    Returns the partner of each a and of each b; −1: none. Every node has at most one partner. The result is exact:
    Jonker–Volgenant on the sparse graph, in which each a may also stay alone at weight 0.
    """
    partner_a, partner_b = np.full(shape[0], -1, np.int64), np.full(shape[1], -1, np.int64)
    if len(weights) == 0:
        return partner_a, partner_b
    rows, row_of = np.unique(a, return_inverse=True)  # only nodes with an edge
    columns, column_of = np.unique(b, return_inverse=True)
    alone = np.arange(len(rows))
    ceiling = float(weights.max()) + 1.0  # keeps all costs above 0: scipy takes a stored 0 for a missing edge
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
