"""Training rows of a store: the log says how well they are mixed, memory decides how, ranks divide them."""

from __future__ import annotations

import json
from collections import Counter
from math import comb
from pathlib import Path

import numpy as np
import pytest
from fakes import HOOK_POINT

from sae import pipeline
from sae.cli import main
from store.activations import ActivationStore
from store.common import TRAIN

SETTINGS = {"d_sae": 24, "tokens": 128 * 100, "config": {"k": 2, "batch_tokens": 128}}


def kept_rows(store: ActivationStore) -> np.ndarray:
    """Every kept training row."""
    filled = [shard for shard, marker in store.markers(TRAIN).items() if marker.contexts]
    return np.concatenate(
        [store.read_acts(TRAIN, s, HOOK_POINT)[store.read_contexts(TRAIN, s).keep.reshape(-1)] for s in filled]
    )


@pytest.fixture
def numbered(tmp_path: Path) -> ActivationStore:
    """48 shards of 4 contexts of 32 rows, 8 wide, whose first value is their context's number; of even contexts 27 rows
    are kept, of odd ones 31."""
    store = ActivationStore.create(
        tmp_path / "acts.zarr",
        hook_points={"h": 8},
        seq_len=32,
        contexts_per_shard=4,
        n_shards={"heldout": 0, "train": 48},
        dtype="float32",
        provenance={"model": {"id": "none"}, "tokenizer_sha256": "", "text": "made up", "text_sha256": ""},
    )
    rng = np.random.default_rng(0)
    with store.hold():
        for shard in range(48):
            acts = rng.normal(size=(4, 32, 8)).astype(np.float32)
            acts[..., 0] = 4 * shard + np.arange(4)[:, None]
            keep = np.ones((4, 32), bool)
            keep[:, 0] = False
            keep[::2, 20:24] = False
            text = np.ones((4, 32), int)
            store.write_shard(
                "train", shard, acts={"h": acts}, tokens=text, keep=keep, document=text, documents={}, cursor={}
            )
    return store


@pytest.mark.parametrize("max_ram_bytes", [10**9, 30_000])
def test_training_logs_how_well_its_batches_are_mixed(
    numbered: ActivationStore, tmp_path: Path, max_ram_bytes: int
) -> None:
    """Logged at step n: distinct contexts in that batch over Σ_c 1 − C(N − k_c, B) / C(N, B)."""
    pipeline.train(numbered.path, tmp_path / "d", max_ram_bytes=max_ram_bytes, **SETTINGS)
    entries = [json.loads(line) for line in (tmp_path / "d" / "metrics.jsonl").read_text().splitlines()]
    batch_rows, per_context = 128, [27, 31] * 96
    n = sum(per_context)
    perfect = sum(1 - comb(n - k, batch_rows) / comb(n, batch_rows) for k in per_context)
    source = pipeline.open_rows(numbered.path, batch_tokens=batch_rows, max_ram_bytes=max_ram_bytes)
    assert source.n_rows == n
    assert source._rows.exact == (max_ram_bytes == 10**9)
    for entry in entries:
        distinct = len(set(source.batch(entry["step"] - 1).x[:, 0].tolist()))
        assert entry["mixing"] == pytest.approx(distinct / perfect, rel=0.01)
    assert [entry["step"] for entry in entries] == [25, 50, 75, 100]
    assert np.mean([entry["mixing"] for entry in entries]) >= 0.95


def test_memory_decides_the_order_so_a_run_continues_with_the_same(tiny_store: Path, tmp_path: Path) -> None:
    command = [
        "train",
        "--acts",
        str(tiny_store),
        "--out",
        str(tmp_path / "d"),
        "--d-sae",
        "24",
        "--l0",
        "2",
        "--tokens",
        "512",
        "--batch-tokens",
        "128",
        "--device",
        "cpu",
    ]
    assert main([*command, "--max-ram", "100k"]) == 0
    assert json.loads((tmp_path / "d" / "config.json").read_text())["store"]["max_ram_bytes"] == 100_000
    with pytest.raises(ValueError, match=r"max_ram_bytes is 100000 there, 1000000000 asked for"):
        pipeline.train(tiny_store, tmp_path / "d", d_sae=24, tokens=512, config={"k": 2, "batch_tokens": 128})


@pytest.mark.parametrize("max_ram_bytes", [10**9, 100_000])
def test_ranks_of_torchrun_share_out_the_rows(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch, max_ram_bytes: int
) -> None:
    rows = kept_rows(ActivationStore.open(tiny_store))
    ranks = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        ranks.append(pipeline.open_rows(tiny_store, batch_tokens=50, seed=7, max_ram_bytes=max_ram_bytes))
    monkeypatch.setenv("WORLD_SIZE", "2")
    explicit = pipeline.open_rows(tiny_store, batch_tokens=50, seed=7, rank=1, world=3, max_ram_bytes=max_ram_bytes)
    assert np.array_equal(explicit.batch(4).x, ranks[1].batch(4).x)
    steps = -(-len(rows) // 150)
    sequence = np.concatenate([rank.batch(step).x.numpy() for step in range(steps) for rank in ranks])[: len(rows)]
    assert Counter(row.tobytes() for row in sequence) == Counter(row.tobytes() for row in rows)


def test_many_processes_do_not_train_the_same_dictionary(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    out = tmp_path / "d"
    assert main(["train", "--acts", str(tiny_store), "--out", str(out), "--d-sae", "24"]) == 2
    assert "4 processes were started (WORLD_SIZE)" in capsys.readouterr().err
    assert not out.exists()
