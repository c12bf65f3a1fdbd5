"""The training of every recipe on a mesh against one process, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from ranks import Case, on_ranks, train_all_on

DEAD = {"dead_tokens": 16}
ORDERS = 8


def recipe_cases(steps: int) -> dict[str, Case]:
    """Every recipe, with dead features, uneven shards and exact ties where they matter."""
    cases = {
        "topk": Case("topk", {"k": 3, "resample_shares": (), **DEAD}),
        "topk, ties": Case("topk", {"k": 3, "resample_shares": (), "aux_coefficient": 0.0}, tied=True),
        "topk, multi": Case("topk", {"k": 2, "multi_k": 4, "resample_shares": (), **DEAD}),
        "batch-topk": Case("batch-topk", {"k": 3, **DEAD}),
        "batch-topk, ties": Case("batch-topk", {"k": 3, "aux_coefficient": 0.0}, tied=True),
        "balanced": Case("balanced", {"k": 3, "min_density": 0.02}),
        "relu": Case("towards-monosemanticity", {"target_l0": 4, "resample_shares": (), **DEAD}),
        "relu, free norms": Case("anthropic-2024-04", {"target_l0": 4, "clip": 0.5}),
        "matryoshka": Case("matryoshka", {"k": 3, **DEAD}),
        "gated": Case("gated", {"target_l0": 4, "resample_shares": (), **DEAD}),
        "jumprelu": Case("jumprelu", {"target_l0": 4, "min_density": 0.02}),
        "p-anneal": Case("p-anneal", {"target_l0": 4, "resample_shares": (), **DEAD}),
        "transcoder": Case("transcoder", {"target_l0": 4, "skip": True}),
        "reseeding": Case("topk", {"k": 3, "resample_shares": (0.3, 0.6), **DEAD}),
        "resampling": Case("towards-monosemanticity", {"l1": 60.0, "lr": 0.02, "resample_shares": (0.5, 0.8), **DEAD}),
        "gated resampling": Case("gated", {"l1": 60.0, "lr": 0.02, "resample_shares": (0.5, 0.8), **DEAD}),
        "crosscoder": Case("crosscoder", {"target_l0": 4}),
        "end-to-end": Case("end-to-end", {"resample_shares": ()}),
    }
    late = ("resampling", "gated resampling")  # no feature is dead before
    return {name: replace(case, steps=max(steps, 30) if name in late else steps) for name, case in cases.items()}


def worst_deviations(
    shape: tuple[int, int], cases: dict[str, Case], expected: dict[str, dict[str, Any]]
) -> dict[tuple[str, str], float]:
    """By case and tensor (or curve), the largest difference on any rank, as a share of the largest value."""
    worst: dict[tuple[str, str], float] = {}
    for found in on_ranks(shape[0] * shape[1], train_all_on, shape, list(cases.values())):
        for name, mine in zip(cases, found, strict=True):
            for key, value in expected[name].items():
                worst[name, key] = max(worst.get((name, key), 0.0), deviation(mine[key], value))
    return worst


def of_all_recipes(steps: int = 30) -> dict[str, Any]:
    """For `scripts/check_ranks.py`: how far each mesh is from one process.

    `float64` is the largest deviation of any tensor, over all recipes. `float32` is that of the curves of loss, error
    and L0, by case; beside it, as `permuted`, the largest of one process whose batches have their rows in another
    order, of ORDERS orders.
    """
    shapes = [(1, 2), (2, 1), (2, 2)]
    cases, found = recipe_cases(steps), {}
    expected = trained_on_one(cases)
    found["float64"] = {f"{r}x{f}": max(worst_deviations((r, f), cases, expected).values()) for r, f in shapes}
    in_float32 = {name: replace(case, float32=True) for name, case in cases.items()}
    expected = {name: {"curve": each["curve"]} for name, each in trained_on_one(in_float32).items()}
    curves = {f"{r}x{f}": worst_deviations((r, f), in_float32, expected) for r, f in shapes}
    curves["permuted"] = {(name, "curve"): by for name, by in of_permuted_rows(in_float32, expected).items()}
    found["float32"] = {name: {mesh: worst[name, "curve"] for mesh, worst in curves.items()} for name in cases}
    return found


def of_permuted_rows(cases: dict[str, Case], expected: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The control: how far the order of rows within batches alone takes the curve of one process, at most."""
    orders = [{name: replace(case, permuted=1 + n) for name, case in cases.items()} for n in range(ORDERS)]
    found = [trained_on_one(each) for each in orders]
    return {name: max(deviation(run[name]["curve"], expected[name]["curve"]) for run in found) for name in cases}


def trained_on_one(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """What one process finds, by case."""
    (found,) = on_ranks(1, train_all_on, (1, 1), list(cases.values()))
    return dict(zip(cases, found, strict=True))


def deviation(found: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest value."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max(initial=0) / max(1e-30, np.abs(expected).max(initial=0)))
