"""Shuffled batches: every kept row once per epoch, and a batch is the same at every call and in every process."""

import functools
import os
import tempfile
from collections import Counter
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.activations import ActivationStore
from store.batches import ShuffledRows
from store.common import StoreError
from store.shuffle_plan import ShardCounts, ShufflePlan

HOOK = "h"
ROW_BYTES = 2 * 4 + 16  # float32 [2], its place in the permutation and its context


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    """A kill does not lose data in the kernel's buffers; only a power cut does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def build(
    path: Path, shard_contexts: tuple[int, ...], seq_len: int, dtype: str = "float32"
) -> tuple[ActivationStore, np.ndarray]:
    """A store whose row r holds (r, shard); returns it and the kept row numbers, ascending.

    BOS is not kept, nor are the last positions of every third context; the held-out shard, the
    padding of short shards and the last train shard (which has no marker) must never be seen.
    """
    room = max(shard_contexts) + 1
    store = ActivationStore.create(
        path,
        hook_points={HOOK: 2},
        seq_len=seq_len,
        contexts_per_shard=room,
        n_shards={"heldout": 1, "train": len(shard_contexts) + 1},
        dtype=dtype,
        provenance={},
    )
    kept_rows = []
    with store.hold():
        for split, numbers in (("heldout", [room]), ("train", shard_contexts)):
            for shard, contexts in enumerate(numbers):
                first = store.first_context(split, shard)
                keep = np.ones((contexts, seq_len), bool)
                keep[:, 0] = False
                keep[2::3, seq_len // 2 + 1 :] = False
                rows = first * seq_len + np.arange(contexts * seq_len)
                acts = np.stack([rows, np.full_like(rows, shard)], axis=1).astype(np.float32)
                store.write_shard(
                    split,
                    shard,
                    acts={HOOK: acts},
                    tokens=np.zeros((contexts, seq_len), int),
                    keep=keep,
                    document=np.zeros((contexts, seq_len), int),
                    documents={},
                    cursor={},
                )
                if split == "train":
                    kept_rows.append(rows[keep.reshape(-1)])
    return store, np.concatenate(kept_rows)


@functools.cache
def shared(shard_contexts: tuple[int, ...], seq_len: int) -> tuple[ActivationStore, np.ndarray]:
    """Stores are read-only here and fsync is slow: one for each requested shape."""
    directory = tempfile.TemporaryDirectory()
    _directories.append(directory)  # removed with the process
    return build(Path(directory.name) / "acts.zarr", shard_contexts, seq_len)


_directories: list[tempfile.TemporaryDirectory] = []
SHAPES = [((3,), 4), ((1, 1, 2), 3), ((5, 2, 5, 5, 0, 1), 6), ((4, 4, 4, 4, 4, 4, 4), 5)]


def ids(batch: np.ndarray) -> np.ndarray:
    return batch[:, 0].astype(np.int64)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    batch_rows=st.integers(1, 70),
    memory_rows=st.integers(0, 200),
    seed=st.integers(0, 2**40),
)
def test_each_epoch_is_a_permutation_of_the_kept_rows(shape, batch_rows, memory_rows, seed) -> None:
    store, kept = shared(*shape)
    rows = ShuffledRows(store, HOOK, batch_rows=batch_rows, seed=seed, memory_bytes=memory_rows * ROW_BYTES)
    assert rows.n_rows == len(kept)
    assert rows.steps_per_epoch == len(kept) / batch_rows
    assert rows.exact == (memory_rows >= len(kept) or shape == SHAPES[0])
    epochs = 3
    steps = -(-epochs * len(kept) // batch_rows)
    sequence = np.concatenate([ids(rows.batch(step)) for step in range(steps)])
    for epoch in range(epochs):
        one = sequence[epoch * len(kept) : (epoch + 1) * len(kept)]
        assert np.array_equal(np.sort(one), kept)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    batch_rows=st.integers(1, 40),
    memory_rows=st.integers(0, 200),
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=12),
)
def test_a_batch_depends_on_its_step_alone(shape, batch_rows, memory_rows, steps) -> None:
    store, _ = shared(*shape)
    arguments = {"batch_rows": batch_rows, "seed": 3, "memory_bytes": memory_rows * ROW_BYTES}
    wandering = ShuffledRows(store, HOOK, **arguments)
    for step in steps:
        fresh = ShuffledRows(store, HOOK, **arguments)
        assert np.array_equal(wandering.batch(step), fresh.batch(step))


def test_batch_across_the_border_of_epochs() -> None:
    store, kept = shared((5, 2, 5, 5, 0, 1), 6)
    n = len(kept)
    single = ShuffledRows(store, HOOK, batch_rows=1, seed=5)
    one_by_one = np.concatenate([ids(single.batch(step)) for step in range(3 * n)])
    assert not np.array_equal(one_by_one[:n], one_by_one[n : 2 * n])  # epochs differ
    wide = ShuffledRows(store, HOOK, batch_rows=n - 1, seed=5)
    assert np.array_equal(ids(wide.batch(1)), one_by_one[n - 1 : 2 * n - 2])
    whole = ShuffledRows(store, HOOK, batch_rows=2 * n + 3, seed=5)  # more than an epoch at once
    assert np.array_equal(ids(whole.batch(0)), one_by_one[: 2 * n + 3])


def test_seeds_give_other_orders_and_pools_visit_shards_in_another_order_each_epoch() -> None:
    store, kept = shared((4, 4, 4, 4, 4, 4, 4), 5)
    n = len(kept)
    orders = [
        ids(ShuffledRows(store, HOOK, batch_rows=n, seed=s, memory_bytes=m).batch(step))
        for s in (0, 1)
        for m in (0, 1 << 20)
        for step in (0, 1)
    ]
    assert len({order.tobytes() for order in orders}) == 8
    pools = ShuffledRows(store, HOOK, batch_rows=n, seed=0, memory_bytes=0)
    visits = [list(dict.fromkeys(pools.batch(epoch)[:, 1].astype(int).tolist())) for epoch in range(4)]
    assert all(sorted(visit) == list(range(7)) for visit in visits)
    assert len({tuple(visit) for visit in visits}) == 4


def test_a_uniform_permutation_is_uniform() -> None:
    """First row of an epoch over 3000 epochs: chi squared of 9 equally likely rows."""
    store, kept = shared((1, 1, 2), 3)
    rows = ShuffledRows(store, HOOK, batch_rows=1, seed=1)
    first = Counter(int(ids(rows.batch(epoch * len(kept)))[0]) for epoch in range(3000))
    expected = 3000 / len(kept)
    chi2 = sum((first[row] - expected) ** 2 / expected for row in kept.tolist())
    assert chi2 < len(kept) - 1 + 6 * np.sqrt(2 * (len(kept) - 1))


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_sample_is_distinct_seeded_and_uniform(memory_bytes) -> None:
    store, kept = shared((5, 2, 5, 5, 0, 1), 6)
    rows = ShuffledRows(store, HOOK, batch_rows=7, seed=0, memory_bytes=memory_bytes)
    drawn = ids(rows.sample(20, seed=4))
    assert len(set(drawn.tolist())) == 20
    assert np.isin(drawn, kept).all()
    other = ShuffledRows(store, HOOK, batch_rows=3, seed=9, memory_bytes=1 << 20)
    assert np.array_equal(ids(other.sample(20, seed=4)), drawn)  # in either mode
    assert not np.array_equal(ids(rows.sample(20, seed=5)), drawn)
    assert np.array_equal(np.sort(ids(rows.sample(len(kept), seed=0))), kept)
    assert rows.sample(0, seed=0).shape == (0, 2)
    with pytest.raises(StoreError, match="cannot draw"):
        rows.sample(len(kept) + 1, seed=0)


def test_sample_favours_no_row() -> None:
    store, kept = shared((5, 2, 5, 5, 0, 1), 6)
    rows = ShuffledRows(store, HOOK, batch_rows=7, seed=0)
    draws, n = 1500, 10
    seen = Counter(np.concatenate([ids(rows.sample(n, seed)) for seed in range(draws)]).tolist())
    share = n / len(kept)
    sigma = np.sqrt(draws * share * (1 - share))
    deviations = [abs(seen[row] - draws * share) / sigma for row in kept.tolist()]
    assert max(deviations) < 4.5


def contexts_of(rows: np.ndarray, seq_len: int) -> list[int]:
    return (ids(rows) // seq_len).tolist()


def distinct_if_perfect(kept: np.ndarray, seq_len: int, batch_rows: int) -> float:
    """Contexts expected among rows drawn without replacement: Σ_c 1 − C(N − k_c, B) / C(N, B), k_c rows kept of c."""
    n, per_context = len(kept), Counter((kept // seq_len).tolist())
    of_k = {k: 1 - comb(n - k, batch_rows) / comb(n, batch_rows) for k in set(per_context.values())}
    return sum(of_k[k] for k in per_context.values())


@pytest.mark.parametrize(("pool_shards", "least"), [(None, 0.98), (3, 0.8)])
def test_mixing_is_counted_against_a_perfect_shuffle(tmp_path, pool_shards, least) -> None:
    seq_len, shards, contexts, batch_rows = 16, 12, 32, 32
    store, kept = build(tmp_path / "acts.zarr", (contexts,) * shards, seq_len)
    rows = ShuffledRows(store, HOOK, batch_rows=batch_rows, seed=0, pool_shards=pool_shards)
    assert rows.exact == (pool_shards is None)
    drawn = [rows.draw(step) for step in range(int(rows.steps_per_epoch))]
    for one in drawn:
        assert one.contexts.tolist() == contexts_of(one.rows, seq_len)
    distinct = [len(set(contexts_of(one.rows, seq_len))) for one in drawn]
    perfect = distinct_if_perfect(kept, seq_len, batch_rows)
    assert [rows.mixing(one.contexts) for one in drawn] == pytest.approx([d / perfect for d in distinct], rel=0.01)
    assert least <= float(np.mean(distinct)) / perfect <= 1.02


@pytest.mark.parametrize("memory_share", [0.1, 0.2, 0.5])
def test_short_memory_mixes_within_five_percent_of_a_perfect_shuffle(tmp_path, memory_share) -> None:
    """Whole shards would not: a batch takes as many rows as three pools of a tenth have contexts."""
    seq_len, shards, contexts, batch_rows = 16, 40, 16, 160
    store, kept = build(tmp_path / "acts.zarr", (contexts,) * shards, seq_len)
    memory_bytes = int(memory_share * len(kept)) * ROW_BYTES
    rows = ShuffledRows(store, HOOK, batch_rows=batch_rows, seed=0, memory_bytes=memory_bytes)
    assert not rows.exact
    assert rows.parts > 1
    steps = int(rows.steps_per_epoch)
    sequence = [rows.batch(step) for step in range(steps + 1)]
    assert np.array_equal(np.sort(ids(np.concatenate(sequence)[: len(kept)])), kept)  # still once an epoch
    perfect = distinct_if_perfect(kept, seq_len, batch_rows)

    def mixing(batches: list[np.ndarray]) -> float:
        return float(np.mean([len(set(contexts_of(one, seq_len))) for one in batches])) / perfect

    assert mixing(sequence[:steps]) >= 0.95
    assert (rows._buffer.nbytes + 16 * len(rows._buffer)) <= memory_bytes
    plain = ShuffledRows(store, HOOK, batch_rows=batch_rows, seed=0, pool_shards=max(1, int(memory_share * shards)))
    assert mixing([plain.batch(step) for step in range(8)]) < 0.95 or memory_share > 0.2  # what it would have been


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    batch_rows=st.integers(1, 30),
    memory_rows=st.integers(0, 200),
    world=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_over_all_ranks_each_row_comes_once_an_epoch(shape, batch_rows, memory_rows, world, seed) -> None:
    """Rank 0's row of step 0, then rank 1's …: one sequence, whose every epoch is a permutation of the kept rows."""
    store, kept = shared(*shape)
    ranks = [
        ShuffledRows(
            store, HOOK, batch_rows=batch_rows, seed=seed, memory_bytes=memory_rows * ROW_BYTES, rank=rank, world=world
        )
        for rank in range(world)
    ]
    steps = -(-2 * len(kept) // (batch_rows * world))
    handed_out = np.concatenate([ids(rank.batch(step)) for step in range(steps) for rank in ranks])
    for epoch in range(2):
        one = handed_out[epoch * len(kept) : (epoch + 1) * len(kept)]
        assert np.array_equal(np.sort(one), kept)


@pytest.mark.parametrize("memory_bytes", [300 * ROW_BYTES, 1 << 20])
def test_ranks_share_out_the_global_batches(tmp_path, memory_bytes) -> None:
    store, kept = build(tmp_path / "acts.zarr", (8,) * 6, 16)
    whole = ShuffledRows(store, HOOK, batch_rows=30, seed=4, memory_bytes=memory_bytes)
    ranks = [
        ShuffledRows(
            store, HOOK, batch_rows=10, seed=4, pool_shards=whole.pool_shards, parts=whole.parts, rank=r, world=3
        )
        for r in range(3)
    ]
    assert ranks[0].steps_per_epoch == whole.steps_per_epoch
    for step in (0, 1, 7, 40):
        assert np.array_equal(np.concatenate([rank.batch(step) for rank in ranks]), whole.batch(step))
    epoch = np.concatenate([ids(rank.batch(step)) for rank in ranks for step in range(len(kept) // 30)])
    assert len(set(epoch.tolist())) == len(epoch)  # disjoint
    with pytest.raises(StoreError, match="rank 3 of 3"):
        ShuffledRows(store, HOOK, batch_rows=10, seed=4, rank=3, world=3)


def test_each_shard_is_read_once_an_epoch_for_each_part(monkeypatch) -> None:
    store, kept = shared((4, 4, 4, 4, 4, 4, 4), 5)
    reads: Counter[int] = Counter()
    read_stored = ActivationStore.read_stored

    def counting(self, split, shard, hook_point):
        reads[shard] += 1
        return read_stored(self, split, shard, hook_point)

    monkeypatch.setattr(ActivationStore, "read_stored", counting)
    for memory_bytes, epochs_read in ((1 << 20, 1), (3 * 16 * ROW_BYTES, 2)):
        reads.clear()
        rows = ShuffledRows(store, HOOK, batch_rows=9, seed=2, memory_bytes=memory_bytes)
        epochs_read *= rows.parts
        for step in range(2 * len(kept) // 9):
            rows.batch(step)
        assert reads == dict.fromkeys(range(7), epochs_read)


def test_memory_budget_bounds_the_pool() -> None:
    store, kept = shared((4, 4, 4, 4, 4, 4, 4), 5)
    largest = max(m.kept_rows for m in store.markers("train").values())
    for budget_rows in range(0, len(kept) + 20, 7):
        rows = ShuffledRows(store, HOOK, batch_rows=9, seed=2, memory_bytes=budget_rows * ROW_BYTES)
        rows.batch(0)
        assert rows._buffer.shape[0] <= max(budget_rows, largest)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_are_those_of_the_store(tmp_path, dtype) -> None:
    store, _ = build(tmp_path / "acts.zarr", (2, 3), 4, dtype)
    kept = np.concatenate(
        [store.read_acts("train", s, HOOK)[store.read_contexts("train", s).keep.reshape(-1)] for s in (0, 1)]
    )
    for memory_bytes in (0, 1 << 20):
        rows = ShuffledRows(store, HOOK, batch_rows=len(kept), seed=0, memory_bytes=memory_bytes)
        batch = rows.batch(0)
        assert batch.dtype == np.float32
        assert Counter(map(tuple, batch.tolist())) == Counter(map(tuple, kept.tolist()))


def test_heldout_split_and_wrong_arguments() -> None:
    store, kept = shared((3,), 4)
    heldout = ShuffledRows(store, HOOK, split="heldout", batch_rows=5, seed=0)
    assert ids(heldout.batch(0)).max() < kept.min()
    with pytest.raises(StoreError, match="no hook point 'g'"):
        ShuffledRows(store, "g", batch_rows=5, seed=0)
    with pytest.raises(StoreError, match="unknown split"):
        ShuffledRows(store, HOOK, split="test", batch_rows=5, seed=0)
    with pytest.raises(StoreError, match="batch_rows"):
        ShuffledRows(store, HOOK, batch_rows=0, seed=0)
    with pytest.raises(StoreError, match="step"):
        heldout.batch(-1)


def test_damage_met_while_loading_leaves_no_half_pool(tmp_path) -> None:
    store, kept = build(tmp_path / "acts.zarr", (2, 3), 4)
    rows = ShuffledRows(store, HOOK, batch_rows=5, seed=0)
    file = store.path / "hooks" / HOOK / "acts" / "c" / "2" / "0"
    sound = file.read_bytes()
    file.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
    for _ in range(2):
        with pytest.raises(StoreError, match=str(file)):
            rows.batch(0)
    file.write_bytes(sound)
    assert np.isin(ids(rows.batch(0)), kept).all()


def test_no_rows_yet(tmp_path) -> None:
    store = ActivationStore.create(
        tmp_path / "acts.zarr",
        hook_points={HOOK: 2},
        seq_len=4,
        contexts_per_shard=2,
        n_shards={"heldout": 1, "train": 1},
        dtype="float16",
        provenance={},
    )
    with pytest.raises(StoreError, match="harvest it first"):
        ShuffledRows(store, HOOK, batch_rows=4, seed=0)


@settings(max_examples=60, deadline=None)
@given(
    kept=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    pool_shards=st.integers(1, 8),
    parts=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_a_plan_names_every_row_once_an_epoch(kept, pool_shards, parts, seed) -> None:
    """Numbers alone, without a store."""
    plan = ShufflePlan(ShardCounts(np.array(kept), np.ones(len(kept))), seed, pool_shards, parts)
    n_rows = sum(kept)
    every = [(place, row) for place, rows in enumerate(kept) for row in range(rows)]
    for epoch in range(2):
        named = []
        for position in range(epoch * n_rows, (epoch + 1) * n_rows):
            pool, order, offset = plan.slot(position)
            held = [
                (place, row)
                for place in pool.places.tolist()
                for row in np.arange(kept[place])[plan.rows_of_shard(pool, place)].tolist()
            ]
            assert len(held) == len(order) == plan.pool_rows(pool).sum() <= plan.largest_pool_rows
            named.append(held[order[offset]])
        assert sorted(named) == every
