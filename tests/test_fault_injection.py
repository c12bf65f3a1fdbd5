"""Twenty kills of a store's writers (scripts/fault_injection.py does hundreds), and that the script would notice."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from store.activations import ActivationStore

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import fault_injection as faults


def write_without_fsync(path: str, rank: int, world: int) -> None:
    """For a separate process: a killed process loses nothing that it wrote; only a loss of power would."""
    os.fsync = lambda handle: None
    faults.write(path, rank, world)


@pytest.mark.parametrize(("workers", "kills"), [(1, 12), (2, 8)])
def test_killed_writers_lose_nothing_and_end_in_the_bytes_of_an_unbroken_run(
    workers: int, kills: int, tmp_path: Path
) -> None:
    tally = faults.kill_store_writers(kills, workers, 5, tmp_path, write_without_fsync)
    assert tally.kills >= kills
    assert tally.stores >= 1
    assert tally.sound, faults.shown([tally])


def test_what_is_wrong_is_counted(tmp_path: Path) -> None:
    store = faults.create(tmp_path / "acts.zarr")
    ones = np.ones((faults.CONTEXTS, faults.SEQ_LEN), int)
    rows = faults.rows_of("train", 3)
    rows[[2, 9]] = 0
    store.write_shard(
        "train", 3, acts={faults.HOOK: rows}, tokens=ones * 3, keep=ones > 0, document=ones, documents={}, cursor={}
    )
    tally = faults.Tally("store", 1)
    faults.check(ActivationStore.open(store.path), {("train", 3), ("train", 4)}, tally)
    assert (tally.wrong_rows, tally.lost_shards, tally.shards_checked) == (2, 1, 1)
    assert not tally.sound
