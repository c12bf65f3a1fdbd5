"""Rows that lie on the device: the same rows in the same order as those that the host hands out, whatever fits."""

from __future__ import annotations

from itertools import pairwise
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from sae.pipeline.resident_rows import ResidentRows, fitting, memory_for_rows
from sae.pipeline.rows import StoreRows
from store.activations import ActivationStore
from store.batches import ShuffledRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D_IN, SEQ_LEN, CONTEXTS, SHARDS = 6, 8, 4, 12
ROW_BYTES = D_IN * 4 + 16  # in the memory of the host, of float32 rows


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Two hook points; one row in eight, and some others, are not kept."""
    made = ActivationStore.create(
        tmp_path_factory.mktemp(request.param) / "acts.zarr",
        hook_points={"x": D_IN, "y": 3},
        seq_len=SEQ_LEN,
        contexts_per_shard=CONTEXTS,
        n_shards={"heldout": 0, "train": SHARDS},
        dtype=request.param,
        provenance={},
    )
    rng = np.random.default_rng(1)
    with made.hold():
        for shard in range(SHARDS):
            keep = np.ones((CONTEXTS, SEQ_LEN), bool)
            keep[:, 0] = False
            keep[shard % CONTEXTS, 3:5] = False
            n, text = CONTEXTS * SEQ_LEN, np.zeros((CONTEXTS, SEQ_LEN), int)
            acts = {name: rng.normal(size=(n, width)).astype(np.float32) for name, width in (("x", D_IN), ("y", 3))}
            made.write_shard("train", shard, acts=acts, tokens=text, keep=keep, document=text, documents={}, cursor={})
    return made


def rows(store: ActivationStore, pool_shards: int, parts: int, **more: Any) -> ShuffledRows:
    usual: dict[str, Any] = {"batch_rows": 23, "seed": 3, "pool_shards": pool_shards, "parts": parts}
    return ShuffledRows(store, "x", **(usual | more))


PLANS = [(SHARDS, 1), (3, 1), (5, 3)]  # a uniform permutation, pools of whole shards, pools of parts of shards


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize(("pool_shards", "parts"), PLANS)
def test_batches_are_those_of_the_host(store: ActivationStore, pool_shards: int, parts: int, everything: bool) -> None:
    host = rows(store, pool_shards, parts)
    resident = ResidentRows(rows(store, pool_shards, parts), DEVICE, everything=everything)
    for step in range(int(2.5 * host.steps_per_epoch)):
        drawn = host.draw(step)
        found, mixing = resident.batch(step)
        assert found.device.type == DEVICE.type
        assert np.array_equal(found.cpu().numpy(), drawn.rows), step
        assert mixing() == host.mixing(drawn.contexts)


@pytest.mark.parametrize("everything", [True, False])
def test_any_step_can_come_next(store: ActivationStore, everything: bool) -> None:
    host, steps = rows(store, 2, 2), [0, 1, 9, 10, 3, 40, 41, 41, 0]
    resident = ResidentRows(rows(store, 2, 2), DEVICE, everything=everything)
    for step in steps:
        assert np.array_equal(resident.batch(step)[0].cpu().numpy(), host.batch(step)), step


@pytest.mark.parametrize("batch_rows", [4, 60, 700])  # less than a pool, about one, more than an epoch
@pytest.mark.parametrize("everything", [True, False])
def test_each_rank_gets_its_own_rows(store: ActivationStore, batch_rows: int, everything: bool) -> None:
    for rank in range(3):
        host, other = (rows(store, 2, 1, batch_rows=batch_rows, rank=rank, world=3) for _ in range(2))
        resident = ResidentRows(other, DEVICE, everything=everything)
        for step in range(6):
            assert np.array_equal(resident.batch(step)[0].cpu().numpy(), host.batch(step))


@pytest.mark.parametrize(("pool_shards", "parts"), PLANS)
def test_samples_are_those_of_the_host(store: ActivationStore, pool_shards: int, parts: int) -> None:
    host = rows(store, pool_shards, parts)
    for everything in (True, False):
        resident = ResidentRows(rows(store, pool_shards, parts), DEVICE, everything=everything)
        for n, seed in ((7, 1), (host.n_rows, 2)):
            assert np.array_equal(resident.sample(n, seed).numpy(), host.sample(n, seed))


def test_all_rows_are_read_once_and_pools_once_an_epoch(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_stored = ActivationStore.read_stored

    def watched(self: ActivationStore, split: str, shard: int, hook: str) -> np.ndarray:
        read.append(shard)
        return read_stored(self, split, shard, hook)

    monkeypatch.setattr(ActivationStore, "read_stored", watched)
    for everything, times in ((True, 1), (False, 3)):
        source = rows(store, 3, 1)
        resident = ResidentRows(source, DEVICE, everything=everything)
        for step in range(int(2.9 * source.steps_per_epoch)):
            resident.batch(step)
        resident._pools.close()  # type: ignore[attr-defined]
        assert all(times <= read.count(shard) <= times + (not everything) for shard in range(SHARDS))
        read.clear()


def test_the_next_pool_is_read_while_one_is_in_use(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, read_pool = [Event() for _ in range(3)], ShuffledRows.read_pool
    numbers = iter(begun)

    def watched(self: ShuffledRows, pool: Any) -> Any:
        if (event := next(numbers, None)) is not None:
            event.set()
        return read_pool(self, pool)

    monkeypatch.setattr(ShuffledRows, "read_pool", watched)
    resident = ResidentRows(rows(store, 6, 1, batch_rows=2), DEVICE, everything=False)
    resident.batch(0)
    assert begun[1].wait(10)
    assert not begun[2].is_set()  # its place is the first pool's, which is in use


@pytest.mark.parametrize("everything", [True, False])
def test_a_read_that_failed_can_be_tried_again(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    host, resident = rows(store, 3, 1), ResidentRows(rows(store, 3, 1), DEVICE, everything=everything)
    fails, read_stored = [5], ActivationStore.read_stored

    def broken(self: ActivationStore, split: str, shard: int, hook: str) -> np.ndarray:
        if shard in fails:
            raise OSError("no such disk")
        return read_stored(self, split, shard, hook)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "read_stored", broken)
        steps = range(int(host.steps_per_epoch))
        with pytest.raises(OSError, match="no such disk"):
            [resident.batch(step) for step in steps]
    for step in range(int(host.steps_per_epoch)):
        assert np.array_equal(resident.batch(step)[0].cpu().numpy(), host.batch(step))


# --- what fits -------------------------------------------------------------------------------------------------------


def test_rows_of_a_store_lie_where_there_is_room(store: ActivationStore) -> None:
    """All rows, two pools, or none: in each case the same x and y."""
    size, n = (4 if store.dtype["x"] == "float32" else 2), rows(store, 1, 1).n_rows
    all_bytes = n * ((D_IN + 3) * size + 2 * 8)
    usual: dict[str, Any] = {"batch_tokens": 20, "seed": 1, "target_hook_point": "y", "max_ram_bytes": 3000}
    host = StoreRows(store, "x", **usual)
    assert not host._rows.exact
    kinds = []
    for n_bytes in (all_bytes, all_bytes - 1, 100):
        held = StoreRows(store, "x", **usual, device=DEVICE, device_bytes=lambda n=n_bytes: n)  # type: ignore[misc]
        for step in range(40):
            for one, other in zip(held.batch(step)[:2], host.batch(step)[:2], strict=True):
                assert one is not None
                assert other is not None
                assert torch.equal(one.cpu(), other)
        assert torch.equal(held.sample(50, 7), host.sample(50, 7))
        assert torch.equal(held.sample_targets(50, 7), host.sample_targets(50, 7))
        kinds.append(None if held._resident[0] is None else held._resident[0]._place.everything)
    assert kinds == [True, False, None]


def test_room_is_what_a_run_leaves() -> None:
    free, d_in, d_sae = 139 * 10**9, 4096, 131_072
    room = memory_for_rows(free, d_in, d_sae, 4096)
    step = 2 * d_in * d_sae * 4 * 4  # both matrices, their gradients and moments, in float32
    assert 0 < room < 0.9 * free - step
    assert memory_for_rows(10**10, d_in, d_sae, 4096) == 0
    sizes = [memory_for_rows(free, 512, n, 4096) for n in (1024, 4096, 16_384)]
    assert all(large > small for large, small in pairwise(sizes))


def test_pools_are_held_where_two_of_them_fit(store: ActivationStore) -> None:
    source = rows(store, 3, 1)
    one_row = source.row_bytes + 8
    assert source.largest_pool_rows < source.n_rows / 2
    assert fitting([source], source.n_rows * one_row) == "all"
    assert fitting([source], source.n_rows * one_row - 1) == "pools"
    assert fitting([source], 2 * source.largest_pool_rows * one_row) == "pools"
    assert fitting([source], 2 * source.largest_pool_rows * one_row - 1) is None
