"""One dictionary on many ranks: the selection of one process, and its numbers step by step."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from fakes import SEED
from ranks import Case, StableKernels, ThreadMesh, bytes_of_a_step, on_ranks, on_threads, several
from recipe_cases import recipe_cases, trained_on_one, worst_deviations

from sae.kernels.sparsity import BatchTopK, Support, TopK
from sae.parallel.cost import exchanged_bytes, first_candidates
from sae.parallel.kernels import agreeing
from sae.parallel.mesh import ONE, Mesh
from sae.parallel.selection import among_largest, kept_by_counts, largest_in_rows, largest_of_rows, smallest_kept
from sae.training.recipes import RECIPES

STEPS = 12  # of a training; `scripts/check_ranks.py --recipes` takes 30
MESHES = [(1, 2), (2, 1), (2, 2)]


# --- the mesh --------------------------------------------------------------------------------------------------------


def test_one_rank_exchanges_nothing_and_changes_nothing() -> None:
    x = torch.randn(3, 4)
    for operation in (ONE.gather_rows, ONE.scatter_sum, ONE.own_rows, ONE.average, ONE.over_shards):
        assert operation(x) is x
    assert ONE.reduce(x, "sum", "world") is x
    assert ONE.scatter_sums([x]) == [x]
    assert ONE.tell({"a": 1}) == {"a": 1}
    assert ONE.agree(True)
    assert not ONE.agree(torch.tensor(False))
    kernels = StableKernels()
    assert agreeing(kernels, ONE) is kernels  # type: ignore[arg-type, comparison-overlap]
    assert not ONE.calls


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_are_even_parts_of_all_features(shards: int) -> None:
    mesh = Mesh()
    mesh.shards = shards
    parts = [mesh.features(23, i) for i in range(shards)]
    assert [feature for part in parts for feature in part] == list(range(23))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def exchanges(shape: tuple[int, int]) -> dict[str, Any]:
    mesh = Mesh(*shape)
    own = torch.full((2, 3), float(mesh.rank), requires_grad=True)
    gathered = mesh.gather_rows(own.detach())
    partial = torch.arange(float(len(gathered) * 3)).view(-1, 3).requires_grad_()
    summed = mesh.scatter_sum(partial * (mesh.rank + 1))
    (summed * (mesh.rank + 1)).sum().backward()
    assert partial.grad is not None
    return {
        "gathered": gathered.tolist(),
        "summed": summed.tolist(),
        "gradient": partial.grad.tolist(),
        "max": mesh.reduce(torch.tensor(mesh.rank), "max", "rows").item(),
        "agreed": (mesh.agree(mesh.rank == mesh.world - 1), mesh.agree(False)),
        "told": mesh.tell({"rank": mesh.rank, "text": "λ" * (mesh.rank + 1)}),
        "everyones": mesh.everyones("x" * mesh.rank),
        "rows": mesh.all_rows(mesh.own_rows(torch.arange(5.0)[:, None]), 5).flatten().tolist(),
    }


def drawn() -> list[tuple[int, int, bool]]:
    """(seed, k, over the batch) of the selections below, others in every session."""
    rng = random.Random(os.environ[SEED])
    return [(rng.randint(0, 10**6), rng.randint(1, 5), rng.random() < 0.5) for _ in range(24)]


@pytest.fixture(scope="module")
def found_on() -> dict[tuple[int, int], list[Any]]:
    """Of each mesh and each of its ranks: exchanges, selections, the bytes of a step; in two groups of processes."""
    case = Case("topk", {"k": 3, "resample_shares": (), "aux_coefficient": 0.0}, steps=1, d_sae=28)

    def calls(shape: tuple[int, int]) -> list[tuple[Any, ...]]:
        return [(exchanges, shape), (selections, shape, drawn()), (bytes_of_a_step, shape, case)]

    two = on_ranks(2, several, *calls((1, 2)), *calls((2, 1)))
    four = on_ranks(4, several, *calls((2, 2)))
    return {(1, 2): [rank[:3] for rank in two], (2, 1): [rank[3:] for rank in two], (2, 2): four}


def test_what_ranks_exchange(found_on: dict[tuple[int, int], list[Any]]) -> None:
    """2 row groups × 2 shards: rank = 2 · row group + shard."""
    for rank, (found, *_) in enumerate(found_on[2, 2]):
        group, shard = divmod(rank, 2)
        ranks = [2 * group, 2 * group + 1]
        assert found["gathered"] == [[float(r)] * 3 for r in ranks for _ in range(2)]
        partial = np.arange(12.0).reshape(4, 3)
        mine = slice(2 * shard, 2 * shard + 2)
        assert found["summed"] == (partial[mine] * sum(r + 1 for r in ranks)).tolist()
        # each row's sum is weighted by the rank that owns the row
        owners = np.repeat([r + 1 for r in ranks], 2)[:, None]
        assert found["gradient"] == (np.ones((4, 3)) * owners * (rank + 1)).tolist()
        assert found["max"] == 2 + shard
        assert found["agreed"] == (True, False)
        assert found["told"] == {"rank": 0, "text": "λ"}
        assert found["everyones"] == ["", "x", "xx", "xxx"]
        assert found["rows"] == [0, 1, 2, 3, 4]


# --- selection -------------------------------------------------------------------------------------------------------


def test_the_largest_of_a_row_are_those_of_a_stable_sort(rng: Any) -> None:
    for _ in range(200):
        n, k = rng.randint(1, 8), rng.randint(1, 8)
        values = torch.tensor([[rng.randint(-1, 3) for _ in range(n)] for _ in range(4)], dtype=torch.float32)
        for row, kept in zip(values.tolist(), among_largest(values, k).tolist(), strict=True):
            ranked = sorted((i for i in range(n) if row[i] > 0), key=lambda i: (-row[i], i))[:k]
            assert [i for i in range(n) if kept[i]] == sorted(ranked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_kept_value_is_found_digit_by_digit(rng: Any, dtype: torch.dtype) -> None:
    """Against sorting, with equal values and values of very different size."""
    bits_of = {torch.float32: (torch.int32, 3), torch.float64: (torch.int64, 6)}[dtype]
    for _ in range(100):
        n, wanted = rng.randint(0, 30), rng.randint(1, 20)
        values = torch.tensor([rng.choice([1e-40, 0.5, 0.5, 1.0, rng.random(), 1e30]) for _ in range(n)], dtype=dtype)
        bar, room = smallest_kept(values.view(bits_of[0]).long(), wanted, lambda counts: counts, bits_of[1])
        if n <= wanted:
            assert (bar, room) == (0, 0)
            continue
        expected = values.sort(descending=True).values[wanted - 1]
        assert torch.tensor([bar]).to(bits_of[0]).view(dtype) == expected
        assert room == wanted - int((values > expected).sum())


def selected(shape: tuple[int, int], seed: int, k: int, batch: bool) -> list[tuple[int, int]]:
    """The (row, feature) pairs that this rank's shard selects, with small whole numbers: many exact ties."""
    mesh, generator = Mesh(*shape), torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (8, 3), generator=generator).double()
    W_enc = torch.randint(-2, 3, (3, 7), generator=generator).double()
    lift = torch.randint(0, 2, (7,), generator=generator).double()
    rows = slice(mesh.row_group * (8 // mesh.row_groups), (mesh.row_group + 1) * (8 // mesh.row_groups))
    own = list(mesh.features(7))
    kernels = agreeing(StableKernels(), mesh)  # type: ignore[arg-type]
    rule = BatchTopK(k, lift[own]) if batch else TopK(k)
    support, pre = kernels.select(x[rows], kernels.prepare(W_enc[:, own]), torch.zeros(len(own)).double(), rule)
    assert torch.equal(pre, (x[rows] @ W_enc[:, own])[support.rows, support.features.long()])
    return [(rows.start + r, own[f]) for r, f in zip(support.rows.tolist(), support.features.tolist(), strict=True)]


def selections(shape: tuple[int, int], cases: list[tuple[int, int, bool]]) -> list[list[tuple[int, int]]]:
    return [selected(shape, *case) for case in cases]


@pytest.mark.parametrize("shape", MESHES)
def test_shards_select_what_brute_force_selects(
    shape: tuple[int, int], found_on: dict[tuple[int, int], list[Any]]
) -> None:
    """The largest values, and of equal ones those of the first rank, then of its first entries."""
    found = [rank[1] for rank in found_on[shape]]
    mesh = Mesh()
    mesh.row_groups, mesh.shards = shape
    shard_of = {feature: i for i in range(shape[1]) for feature in mesh.features(7, i)}
    for number, (seed, k, batch) in enumerate(drawn()):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-2, 3, (8, 3), generator=generator)
        pre = (x @ torch.randint(-2, 3, (3, 7), generator=generator)).tolist()
        lift = torch.randint(0, 2, (7,), generator=generator).tolist() if batch else [0] * 7
        ranked = sorted(
            ((r, f) for r in range(8) for f in range(7) if pre[r][f] > 0),
            key=lambda e: (-pre[e[0]][e[1]] - lift[e[1]], e[0] * shape[0] // 8, shard_of[e[1]], e),
        )
        expected = ranked[: 8 * k] if batch else [e for r in range(8) for e in [e for e in ranked if e[0] == r][:k]]
        assert sorted(e for rank in found for e in rank[number]) == sorted(expected), (seed, k, batch)


def rows_of_many_shards(rng: random.Random, shards: int, k: int) -> torch.Tensor:
    """Values of eight rows, shard after shard, as an adversary to a first round would have them."""
    each, n = rng.randint(1, 2 * k), 8
    values = torch.randn((n, shards, each), generator=torch.Generator().manual_seed(rng.randint(0, 10**6)))
    values[0, rng.randrange(shards)] += 10  # all of the largest in one shard
    values[1, : rng.randint(1, shards)] += 10
    values[2] = values[2].round()  # ties, also of the smallest that is kept
    values[3] = 1.0  # nothing but ties: the first are kept
    values[4, 1 + rng.randrange(shards - 1) :] = 1.0
    values[5] = -values[5].abs()  # nothing positive
    values[6, rng.randrange(shards)] = 0.5  # fewer positive ones than k, perhaps
    values[6, rng.randrange(shards)] = -1.0
    return values.flatten(1)


@pytest.mark.parametrize("shards", [3, 17, 24, 64])
def test_two_rounds_of_candidates_keep_what_one_process_keeps(rng: random.Random, shards: int) -> None:
    """Of dense values and of a sparse support, on shards that are threads, against a stable sort of whole rows."""
    for _ in range(2):
        k = rng.randint(1, 12)
        values = rows_of_many_shards(rng, shards, k)
        parts, wanted = values.chunk(shards, 1), _first_of(values, k).chunk(shards, 1)

        def selected(mesh: ThreadMesh, k: int = k, parts: Any = parts) -> tuple[Any, Any, list[Any]]:
            own = parts[mesh.shard]
            dense = largest_in_rows(mesh, own, k)
            first = mesh.stacked.copy()
            mine = _first_of(own, k)
            among = Support.of(mine)
            kept = largest_of_rows(mesh, among, own[mine], k)
            assert mesh.stacked == first * 2
            return dense, among.where(kept).dense(torch.ones(int(kept.sum()))) > 0, first

        found = on_threads(shards, selected)
        everything = torch.cat([dense for dense, *_ in found], 1)
        assert torch.equal((values * everything).sort().values, (values * torch.cat(wanted, 1)).sort().values)
        for (dense, sparse, calls), part in zip(found, wanted, strict=True):
            assert torch.equal(sparse, part)
            assert torch.equal(dense.sum(-1), part.sum(-1))  # which of equal ones a dense topk takes is left open
            few = first_candidates(k, shards)
            assert calls[0] == (8, few)
            enough = few == k or parts[0].shape[1] < few
            assert len(calls) == (1 if enough else 2)  # the adversary's rows come again
            assert all(shape[0] < 8 and shape[1] == k for shape in calls[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shards", [2, 5, 24])
def test_counts_by_digit_keep_what_one_process_keeps(rng: random.Random, shards: int, dtype: torch.dtype) -> None:
    """The adversary's rows against a stable sort of whole rows; no candidate is sent, only how many are equal."""
    for k in (1, rng.randint(2, 40), 1000):
        values = rows_of_many_shards(rng, shards, min(k, 12)).to(dtype)
        parts = values.chunk(shards, 1)

        def kept(mesh: ThreadMesh, k: int = k, parts: Any = parts) -> tuple[torch.Tensor, list[Any]]:
            return kept_by_counts(mesh, parts[mesh.shard], k), mesh.stacked

        found = on_threads(shards, kept)
        assert torch.equal(torch.cat([own for own, _ in found], 1), _first_of(values, k))
        assert all(calls == [(8, 1)] for _, calls in found)


def test_many_candidates_are_counted_and_few_are_sent() -> None:
    """2,048 a row, as AuxK keeps with d_in 4,096, and 32."""
    values = torch.randn((3, 4 * 2048), generator=torch.Generator().manual_seed(0))
    for k, sent in ((2048, [(3, 1)]), (32, [(3, 32)])):

        def calls(mesh: ThreadMesh, k: int = k) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
            return largest_in_rows(mesh, values.chunk(4, 1)[mesh.shard], k), mesh.stacked

        found = on_threads(4, calls)
        assert torch.equal(torch.cat([kept for kept, _ in found], 1), _first_of(values, k))
        assert all(shapes == sent for _, shapes in found)


def _first_of(values: torch.Tensor, k: int) -> torch.Tensor:
    order = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, True) & (values > 0)


def test_rows_spread_over_shards_need_no_second_round() -> None:
    """Each shard has one of the largest: what all send first is enough, and no row is sent twice."""
    shards, k = 32, 8
    values = torch.arange(4 * 5 * shards).view(4, 5, shards).transpose(1, 2).flatten(1).float() + 1

    def calls(mesh: ThreadMesh) -> list[tuple[int, ...]]:
        largest_in_rows(mesh, values.chunk(shards, 1)[mesh.shard], k)
        return mesh.stacked

    assert on_threads(shards, calls) == [[(4, first_candidates(k, shards))]] * shards


@pytest.mark.parametrize("shape", MESHES)
def test_a_step_exchanges_the_bytes_of_the_formulas(
    shape: tuple[int, int], found_on: dict[tuple[int, int], list[Any]]
) -> None:
    found = found_on[shape][0][2]
    given = {"d_in": 8, "d_sae": 28, "batch_tokens": 16, "k": 3, "bytes_per_value": 8}
    for operation, expected in exchanged_bytes(*shape, **given).items():
        assert abs(found.get(operation, 0) - expected) <= 400, (operation, found, expected)  # b_dec, counts, flags


# --- training --------------------------------------------------------------------------------------------------------

CASES = recipe_cases(STEPS)


@pytest.fixture(scope="module")
def on_one() -> dict[str, dict[str, Any]]:
    return trained_on_one(CASES)


def of_this_session(shape: tuple[int, int]) -> dict[str, Case]:
    """All cases on the mesh of both axes; of the recipes half on each mesh of one axis, in the next session the others.

    `scripts/check_ranks.py --recipes` trains all of them on each mesh, for 30 steps.
    """
    if shape == (2, 2):
        return CASES
    recipes = {case.recipe: name for name, case in reversed(CASES.items())}
    first = (int(os.environ[SEED]) + MESHES.index(shape)) % 2
    return {name: CASES[name] for name in list(recipes.values())[first::2]}


@pytest.mark.parametrize("shape", MESHES)
def test_many_ranks_compute_what_one_process_computes(
    on_one: dict[str, dict[str, Any]], shape: tuple[int, int]
) -> None:
    """Every recipe, in float64: curves, all parameters, Adam's moments and counters."""
    cases = of_this_session(shape)
    worst = worst_deviations(shape, cases, on_one)
    assert max(worst.values()) < 1e-12, {where: by for where, by in worst.items() if by >= 1e-12}


def test_the_cases_are_the_hard_ones(on_one: dict[str, dict[str, Any]]) -> None:
    assert all(on_one[name]["dead"] > 3 * STEPS for name in ("topk", "batch-topk", "matryoshka"))  # AuxK has work
    assert all(on_one[name]["placed"] for name in ("reseeding", "resampling", "gated resampling"))
    assert {case.recipe for case in CASES.values()} == set(RECIPES)
