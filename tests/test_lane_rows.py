"""Rows in lanes: each rank reads its own shards alone, and the rows of a batch do not depend on the number of ranks."""

from __future__ import annotations

import shutil
from collections import Counter
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import PlantedRows, StoppingRows, on_ranks, several

from sae import pipeline
from sae.dictionary.files import load
from sae.jobs.progress import Interrupted
from sae.parallel.mesh import Mesh
from sae.pipeline.errors import PipelineError
from sae.pipeline.live import live_rows
from sae.pipeline.rows import StoreRows, rows_for
from sae.training import loop
from sae.training.live_rows import LiveLanes
from sae.training.recipes import resolve
from sae.training.rows import Batch
from sae.training.state_files import read_state, saved_header
from store.activations import ActivationStore
from store.common import TRAIN, StoreError
from store.lane_rows import LaneRows
from store.shuffle_plan import dealt_to_lanes

SHARDS, CONTEXTS, SEQ_LEN, D_IN = 24, 8, 16, 4
ROW_BYTES = 4 * D_IN + 16  # float32, its place in the permutation and its context


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """24 shards of 8 contexts, of which 14 or 15 rows are kept; a row holds its number, its shard and noise."""
    rng = np.random.default_rng(0)
    made = ActivationStore.create(
        tmp_path_factory.mktemp("lanes") / "acts.zarr",
        hook_points={"h": D_IN, "y": 3},
        seq_len=SEQ_LEN,
        contexts_per_shard=CONTEXTS,
        n_shards={"heldout": 0, "train": SHARDS},
        dtype="float32",
        provenance={"model": {"id": "none"}, "tokenizer_sha256": "", "text": "made up", "text_sha256": ""},
    )
    with made.hold():
        for shard in range(SHARDS):
            rows = np.arange(CONTEXTS * SEQ_LEN) + shard * CONTEXTS * SEQ_LEN
            acts = rng.normal(size=(CONTEXTS, SEQ_LEN, D_IN)).astype(np.float32)
            acts[..., 0], acts[..., 1] = rows.reshape(CONTEXTS, SEQ_LEN), shard
            keep = np.ones((CONTEXTS, SEQ_LEN), bool)
            keep[:, 0] = False
            keep[::2, 7] = False
            made.write_shard(
                "train",
                shard,
                acts={"h": acts, "y": acts[..., :3] + 0.5},
                tokens=keep.astype(int),
                keep=keep,
                document=keep.astype(int),
                documents={},
                cursor={},
            )
    return made


def kept(store: ActivationStore) -> list[np.ndarray]:
    """The kept rows of each shard."""
    return [store.read_acts(TRAIN, s, "h")[store.read_keep(TRAIN, s).reshape(-1)] for s in range(SHARDS)]


def on_world(store: ActivationStore, world: int, **how: Any) -> list[LaneRows]:
    return [LaneRows(store, "h", lanes=8, batch_rows=64 // world, rank=r, world=world, **how) for r in range(world)]


@pytest.mark.parametrize("memory_bytes", [1 << 20, 8 * 120 * ROW_BYTES])
def test_the_rows_of_a_batch_are_the_same_on_any_number_of_ranks(store: ActivationStore, memory_bytes: int) -> None:
    (one,), (other,) = (on_world(store, 1, seed=seed, memory_bytes=memory_bytes) for seed in (3, 4))
    worlds = [on_world(store, world, seed=3, memory_bytes=memory_bytes) for world in (2, 4, 8)]
    for step in (0, 5, 47, 12, 300):
        expected = one.batch(step)
        assert not np.array_equal(other.batch(step), expected)
        for ranks in worlds:
            assert np.array_equal(np.concatenate([rank.batch(step) for rank in ranks]), expected)


@settings(max_examples=10, deadline=None)
@given(lanes=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), each=st.integers(3, 9), memory=st.integers(0, 4000))
def test_each_row_of_a_lane_comes_once_an_epoch(store: ActivationStore, lanes: int, each: int, memory: int) -> None:
    """Every batch has `each` rows of every lane."""
    rows = LaneRows(store, "h", lanes=lanes, batch_rows=each * lanes, seed=1, memory_bytes=memory * ROW_BYTES)
    lane_rows = len(np.concatenate(kept(store))) // lanes  # shards are equal, so lanes are
    steps = -(-lane_rows // each)
    sequence = np.stack([rows.batch(step).reshape(lanes, each, D_IN) for step in range(steps)], 1)
    seen: Counter[int] = Counter()
    for lane in sequence.reshape(lanes, steps * each, D_IN):
        assert len(np.unique(lane[:, 1])) == SHARDS // lanes
        seen.update(lane[:lane_rows, 0].astype(int).tolist())
    assert seen == Counter(np.concatenate(kept(store))[:, 0].astype(int).tolist())


@pytest.mark.parametrize("memory_share", [0.2, 0.5, 2])
def test_batches_of_all_lanes_are_mixed_within_five_percent_of_a_perfect_shuffle(
    store: ActivationStore, memory_share: float
) -> None:
    """Distinct contexts against Σ_c 1 − C(N − k_c, B) / C(N, B); a rank's own figure agrees."""
    n, batch_rows, per_context = len(np.concatenate(kept(store))), 96, [14, 15] * (CONTEXTS * SHARDS // 2)
    assert sum(per_context) == n
    perfect = sum(1 - comb(n - k, batch_rows) / comb(n, batch_rows) for k in per_context)
    how = {"lanes": 6, "seed": 0, "memory_bytes": int(memory_share * n) * ROW_BYTES}
    rows = LaneRows(store, "h", batch_rows=batch_rows, **how)
    half = LaneRows(store, "h", batch_rows=batch_rows // 2, rank=1, world=2, **how)
    drawn = [rows.draw(step) for step in range(n // batch_rows)]
    distinct = np.array([len(set((one.rows[:, 0] // SEQ_LEN).tolist())) for one in drawn])
    assert 0.95 <= distinct.mean() / perfect <= 1.03
    assert np.mean([rows.mixing(one.contexts) for one in drawn]) == pytest.approx(distinct.mean() / perfect, rel=0.01)
    own = [half.mixing(half.draw(step).contexts) for step in range(n // batch_rows)]
    assert np.mean(own) == pytest.approx(distinct.mean() / perfect, rel=0.05)


def test_a_sample_is_put_together_from_all_lanes(store: ActivationStore) -> None:
    n, everything = 500, np.concatenate(kept(store))
    how: dict[str, Any] = {"lanes": 8, "seed": 0}
    one = LaneRows(store, "h", batch_rows=8, **how)
    drawn = one.sample(n, 5)
    assert len(np.unique(drawn[:, 0])) == n
    assert np.isin(drawn[:, 0], everything[:, 0]).all()
    ranks = [LaneRows(store, "h", batch_rows=4, rank=r, world=2, **how) for r in range(2)]
    parts = [rank.sample(n, 5) for rank in ranks]
    assert np.array_equal(np.concatenate(parts), drawn)
    assert ranks[0].sample_lengths(n) == [len(part) for part in parts]
    assert not np.array_equal(one.sample(n, 6), drawn)
    assert set(one.sample(len(everything), 0)[:, 0].tolist()) == set(everything[:, 0].tolist())
    shares: Counter[int] = Counter()
    for seed in range(40):
        shares.update(one.sample(n, seed)[:, 1].astype(int).tolist())
    assert min(shares.values()) > 0.8 * 40 * n / SHARDS  # each shard as often as another
    with pytest.raises(StoreError, match="cannot draw"):
        one.sample(len(everything) + 1, 0)


def test_rows_of_two_hook_points_belong_together(store: ActivationStore) -> None:
    how: dict[str, Any] = {"batch_tokens": 24, "seed": 0, "lanes": 6, "max_ram_bytes": 700 * ROW_BYTES}
    rows = StoreRows(store, "h", target_hook_point="y", **how)
    assert not rows._rows.exact
    for step in (0, 31):
        batch = rows.batch(step)
        assert batch.y is not None
        assert torch.equal(batch.y, batch.x[:, :3] + 0.5)
    assert torch.equal(rows.sample_targets(50, 1), rows.sample(50, 1)[:, :3] + 0.5)


@given(rows=st.lists(st.integers(1, 50), min_size=1, max_size=30), lanes=st.integers(1, 10))
def test_lanes_have_all_shards_and_about_equally_many_rows(rows: list[int], lanes: int) -> None:
    """Greedy: the lanes differ by no more than the largest shard."""
    dealt = dealt_to_lanes(np.array(rows), lanes)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(rows)))
    held = [sum(rows[place] for place in lane) for lane in dealt]
    assert max(held) - min(held) <= max(rows)


@pytest.mark.parametrize(
    ("lanes", "batch_rows", "world", "message"),
    [
        (6, 24, 4, r"6 lanes and 4 processes. Use 4 or 8 lanes"),
        (8, 6, 2, r"batch of 12 rows cannot be taken evenly from 8 lanes.* Use --batch-tokens 8 or 16"),
        (16, 16, 1, r"24 shards .* cannot be divided into 16 lanes .* Use 12 lanes or fewer"),
        (64, 64, 1, r"cannot be divided into 64 lanes .* Use 24 lanes or fewer"),
    ],
)
def test_lanes_that_do_not_fit_are_refused(
    store: ActivationStore, lanes: int, batch_rows: int, world: int, message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        LaneRows(store, "h", lanes=lanes, batch_rows=batch_rows, seed=0, world=world)


def test_rows_of_ones_own_have_no_lanes(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"row_lanes \(4\) divides the shards of one store, or the text"):
        pipeline.train(
            PlantedRows(16), tmp_path, config={"row_lanes": 4, "batch_tokens": 16, "k": 3}, d_sae=16, recipe="topk"
        )


# --- on several ranks ------------------------------------------------------------------------------------------------

GIVEN = {"d_sae": 27, "batch_tokens": 48, "tokens": 48 * 24, "matmul": "highest", "k": 3, "dead_tokens": 16}


class InFloat64:
    """The rows of a store in float64, of which one batch comes with a signal to stop."""

    def __init__(self, rows: StoreRows, stop_at: int) -> None:
        self._rows, self._signal = rows, StoppingRows(1, stop_at)
        self.d_in, self.samples_together = rows.d_in, rows.samples_together

    def batch(self, step: int) -> Batch:
        self._signal.batch(step)
        return Batch(self._rows.batch(step).x.double())

    def sample(self, n: int, seed: int) -> torch.Tensor:
        return self._rows.sample(n, seed).double()


def trained_on(shape: tuple[int, int], path: str, out: str, stop_at: int = 0) -> int:
    """Trains in float64 on rows in lanes; returns the last saved step."""
    torch.set_default_dtype(torch.float64)
    mesh = Mesh(*shape)
    _, config = resolve("topk", row_lanes=4, resample_shares=(0.7,), **GIVEN)
    store = ActivationStore.open(path.format(rank=mesh.rank))
    rows = InFloat64(rows_for(store, "h", config, None, mesh=mesh), stop_at)
    try:
        loop.train(rows, out, config, kernels="reference", mesh=mesh)
    except Interrupted:
        assert stop_at
    return int(saved_header(Path(out))["step"])


def test_ranks_open_their_own_shards_alone_and_any_mesh_continues(store: ActivationStore, tmp_path: Path) -> None:
    """On each rank's copy of the store the shards of the other rank are garbage, which reading would refuse."""
    own = dealt_to_lanes(np.array([marker.kept_rows for marker in store.markers(TRAIN).values()]), 4)
    for rank in range(2):
        shutil.copytree(store.path, tmp_path / f"acts-{rank}")
        for shard in np.concatenate(own[2:] if rank == 0 else own[:2]).tolist():
            for path in (tmp_path / f"acts-{rank}").rglob(f"c/{shard}/*"):
                path.write_bytes(b"\1" * path.stat().st_size)
    with pytest.raises(StoreError):
        LaneRows(ActivationStore.open(tmp_path / "acts-0"), "h", lanes=4, batch_rows=48, seed=0).batch(0)
    parted = str(tmp_path / "acts-{rank}")
    stopped = on_ranks(2, trained_on, (1, 2), parted, str(tmp_path / "many"), 12)
    assert stopped in ([steps] * 2 for steps in range(8, 14))  # it reads some steps ahead
    shutil.copytree(tmp_path / "many", tmp_path / "again")
    runs = [(trained_on, (1, 1), str(store.path), str(tmp_path / name)) for name in ("one", "many")]
    assert on_ranks(1, several, *runs) == [[24, 24]]
    assert on_ranks(2, trained_on, (2, 1), parted, str(tmp_path / "again")) == [24, 24]
    expected, _ = read_state(tmp_path / "one", Mesh(), 27) or ({}, {})
    for name in ("many", "again"):
        found, _ = read_state(tmp_path / name, Mesh(), 27) or ({}, {})
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-10, atol=1e-12, msg=f"{name} {key}")


def trained_live(shape: tuple[int, int], model: str, text: str, out: str) -> list[float]:
    """Trains in lanes of a running model; returns the mean of a sample, which the ranks draw together."""
    mesh = Mesh(*shape)
    _, config = resolve("topk", row_lanes=4, **{**GIVEN, "tokens": 48 * 6})
    rows, _ = live_rows(pipeline.Live(model, text, dtype="float32"), config, None, None, "cpu", Path(out))
    assert isinstance(rows, LiveLanes)
    own = rows.on(mesh)
    loop.train(own, out, config, kernels="reference", mesh=mesh)
    return [*own.sample(50, 3).mean(0).tolist(), float(len(own.sample(6, 1)))]


def test_ranks_train_on_their_own_lanes_of_a_running_model(
    tmp_path: Path, tiny_model_dir: Path, tiny_text: Path
) -> None:
    given = (str(tiny_model_dir), str(tiny_text))
    (one,) = on_ranks(1, trained_live, (1, 1), *given, str(tmp_path / "one"))
    assert on_ranks(2, trained_live, (1, 2), *given, str(tmp_path / "many")) == [one] * 2
    assert one[-1] == 6
    expected, found = (load(tmp_path / name).tensors() for name in ("one", "many"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
