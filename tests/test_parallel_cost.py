"""What a step exchanges, by formula and counted; which mesh `auto` takes; what is wrong with `--shard`."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from ranks import exchanged_on_fake_ranks, on_ranks, several

from sae.parallel.cost import ALL_CANDIDATES, cheapest, exchanged_bytes, first_candidates, modelled_step_s
from sae.parallel.launch import _reason, check_started, mesh_shape

SIZES = {"d_in": 4096, "d_sae": 131_072, "batch_tokens": 4096, "k": 32}


def test_what_is_wrong_with_shard_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    check_started(None)
    with pytest.raises(ValueError, match="torchrun --standalone --nproc-per-node N -m sae.cli train … --shard rows"):
        check_started("rows")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="6 processes were started"):
        check_started(None)
    for shard, message in (
        ("2x2", "needs 4 processes, and 6 run. Use 6x1, 3x2, 2x3, 1x6"),
        ("columns", "must be one of features, rows"),
        ("features", "Use --batch-tokens 4092 or 4098"),
    ):
        with pytest.raises(ValueError, match=message):
            mesh_shape(shard, **SIZES)
    fitting = {**SIZES, "batch_tokens": 6144}
    assert [mesh_shape(shard, **fitting) for shard in ("features", "rows", "3x2")] == [(1, 6), (6, 1), (3, 2)]
    with pytest.raises(ValueError, match="5 features cannot be divided among 6 shards"):
        mesh_shape("features", **{**fitting, "d_sae": 5})


def test_auto_says_what_it_saves() -> None:
    expected = "; auto: 179.8 MB on 1x8 reach a rank in a step, 7,517.3 MB on 8x1"
    assert _reason((1, 8), **SIZES) == expected
    assert _reason((8, 1), **SIZES).endswith("on 8x1 reach a rank in a step, 179.8 MB on 1x8")


def test_auto_exchanges_least() -> None:
    assert cheapest(8, 8, **SIZES) == (1, 8)
    assert cheapest(8, 8, **{**SIZES, "d_sae": 512}) == (8, 1)  # gradients of so few features are less than the rows
    assert cheapest(32, 8, **{**SIZES, "d_sae": 1 << 24, "batch_tokens": 131_072})[1] >= 8


CALLS = {  # of a topk step, whatever the number of ranks: by shards, by row groups, by both
    "1xF": {"gather_rows": 2, "stack": 1, "scatter_sum": 1, "reduce": 3},
    "Rx1": {"reduce": 7},
    "RxF": {"gather_rows": 2, "stack": 1, "scatter_sum": 1, "reduce": 7},
}


def test_calls_and_bytes_of_a_step_on_many_ranks() -> None:
    """On up to 1,024 ranks that are not there: what rank 0 calls and gets, against the formulas."""
    shapes = [(1, 8), (8, 1), (8, 8), (1, 64), (128, 8), (32, 32)]
    (all_found,) = on_ranks(1, several, *((exchanged_on_fake_ranks, shape, 2048) for shape in shapes))
    for shape, (calls, found) in zip(shapes, all_found, strict=True):
        given = {"d_in": 8, "d_sae": 2048, "batch_tokens": 8 * shape[0] * shape[1], "k": 4}
        for operation, expected in exchanged_bytes(*shape, **given).items():
            assert abs(found.get(operation, 0) - expected) <= 600, (shape, operation, found, expected)  # b_dec, counts
        assert calls == CALLS[f"{'1' if shape[0] == 1 else 'R'}x{'1' if shape[1] == 1 else 'F'}"], shape


def test_shards_send_as_few_candidates_as_rarely_are_too_few(rng: random.Random) -> None:
    """Against drawing where the k largest of a row lie: how many shards have so many of them that rows come again."""
    assert all(first_candidates(32, shards) == 32 for shards in range(1, ALL_CANDIDATES + 1))
    for shards, k in ((17, 32), (64, 32), (64, 512), (1024, 32)):
        rows = 400
        most = sorted(max(Counter(rng.choices(range(shards), k=k)).values()) for _ in range(rows))
        cost = [c + k * sum(n >= c for n in most) / rows for c in range(1, k + 1)]
        chosen = first_candidates(k, shards)
        assert chosen + 0.05 * k < k
        assert cost[chosen - 1] < 1.15 * min(cost) + 1, (shards, k, chosen, cost)


def test_the_modelled_times_are_those_of_the_documentation() -> None:
    """Each line of the table: features, batch, then milliseconds on the meshes of its heading."""
    lines = (Path(__file__).parent.parent / "docs/gpus-and-many-machines.md").read_text().splitlines()
    (heading,) = (i for i, line in enumerate(lines) if line.startswith("| features | batch | 1x1"))
    shapes = [tuple(map(int, cell.split("x"))) for cell in lines[heading].strip("| ").split(" | ")[2:]]
    rows = [line.strip("| ").split(" | ") for line in lines[heading + 2 : heading + 9]]
    assert len(shapes) == 8
    for features, batch, *times in rows:
        sizes = {"d_sae": int(features.replace(",", "")), "batch_tokens": int(batch.replace(",", ""))}
        for (r, f), time in zip(shapes, times, strict=True):
            assert time == f"{1e3 * modelled_step_s(r, f, **sizes):,.0f}", (features, batch, r, f)


def test_the_formulas_give_the_figures_of_the_documentation() -> None:
    def total(row_groups: int, shards: int, d_sae: int) -> float:
        return sum(exchanged_bytes(row_groups, shards, **{**SIZES, "d_sae": d_sae}).values())

    for d_sae in (131_072, 1 << 20):
        assert round(total(1, 8, d_sae) / 1e6, -1) == 180
    assert round(total(8, 1, 131_072) / 1e9, 1) == 7.5
    assert round(total(8, 1, 1 << 20) / 1e9) == 60
