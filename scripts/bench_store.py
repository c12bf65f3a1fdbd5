"""Compares the activation store with numpy memmap and safetensors shards, at three shard sizes; prints tables.

    python scripts/bench_store.py --rows 262144 --json docs/measurements/store-figures.json
    python scripts/bench_store.py --rows 65536 --rounds 1                         # a minute

Every format writes the same float16 rows, with each file fsync'd, and reads one epoch of shuffled float32 batches from
a warm page cache: `exact` in one permutation of all rows, `two-level` with memory for a quarter of them. memmap gathers
its rows by the permutation in both cases; safetensors are read as the store is. Times are medians over rounds in which
the formats take turns. The last table measures the harvest that writes such a store.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from figures import record, table

from store.activations import ActivationStore
from store.batches import ShuffledRows

SEQ_LEN, D_IN, HOOK = 256, 512, "h"
BATCH_ROWS = 4096
SHARD_ROWS = (1024, 8192, 65_536)
MEMORY_SHARE = 4


def made_rows(rows: int, d_in: int) -> np.ndarray:
    """Random rows of which half of the numbers are zero, as after a ReLU."""
    return np.maximum(np.random.default_rng(0).standard_normal((rows, d_in), np.float32), 0).astype(np.float16)


def write_store(path: Path, acts: np.ndarray, shard_rows: int) -> None:
    contexts, n_shards = shard_rows // SEQ_LEN, len(acts) // shard_rows
    store = ActivationStore.create(
        path,
        hook_points={HOOK: acts.shape[1]},
        seq_len=SEQ_LEN,
        contexts_per_shard=contexts,
        n_shards={"heldout": 0, "train": n_shards},
        dtype="float16",
        provenance={},
    )
    text = np.ones((contexts, SEQ_LEN), int)
    with store.hold():
        for shard in range(n_shards):
            store.write_shard(
                "train",
                shard,
                acts={HOOK: acts[shard * shard_rows : (shard + 1) * shard_rows]},
                tokens=text,
                keep=text > 0,
                document=text,
                documents={},
                cursor={},
            )
        store.finish()


class Store:
    name = "activation store"

    def __init__(self, directory: Path, acts: np.ndarray, shard_rows: int) -> None:
        self.path, self.acts, self.shard_rows = directory / "acts.zarr", acts, shard_rows

    def write(self) -> None:
        write_store(self.path, self.acts, self.shard_rows)

    def shuffled(self, memory_share: int) -> ShuffledRows:
        memory_bytes = 2 * self.acts.nbytes if memory_share == 1 else self.acts.nbytes // memory_share
        return ShuffledRows(
            ActivationStore.open(self.path), HOOK, batch_rows=BATCH_ROWS, seed=1, memory_bytes=memory_bytes
        )

    def read(self, memory_share: int) -> int:
        source = self.shuffled(memory_share)
        return sum(len(source.batch(step)) for step in range(len(self.acts) // BATCH_ROWS))


class Memmap:
    name = "numpy memmap"

    def __init__(self, directory: Path, acts: np.ndarray, shard_rows: int) -> None:
        self.path, self.acts = directory / "rows.bin", acts

    def write(self) -> None:
        with open(self.path, "wb") as file:
            file.write(self.acts.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def read(self, memory_share: int) -> int:
        rows = np.memmap(self.path, np.float16, "r", shape=self.acts.shape)
        return sum(map(len, gathered(rows, np.random.default_rng(1).permutation(len(rows)))))


class Safetensors:
    name = "safetensors shards"

    def __init__(self, directory: Path, acts: np.ndarray, shard_rows: int) -> None:
        self.directory, self.acts, self.shard_rows = directory, acts, shard_rows
        self.shards = len(acts) // shard_rows

    def write(self) -> None:
        from safetensors.numpy import save_file

        for shard in range(self.shards):
            path = self.directory / f"{shard}.safetensors"
            save_file({"acts": self.acts[shard * self.shard_rows : (shard + 1) * self.shard_rows]}, path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def read(self, memory_share: int) -> int:
        """Reads pools of whole shards, each permuted, as a trainer of such files does; rows mix only within a pool."""
        from safetensors.numpy import load_file

        rng, seen = np.random.default_rng(1), 0
        for places in np.array_split(rng.permutation(self.shards), min(memory_share, self.shards)):
            pool = np.concatenate([load_file(self.directory / f"{place}.safetensors")["acts"] for place in places])
            seen += sum(map(len, gathered(pool, rng.permutation(len(pool)))))
        return seen


def gathered(rows: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    return [rows[order[start : start + BATCH_ROWS]].astype(np.float32) for start in range(0, len(order), BATCH_ROWS)]


FORMATS = (Memmap, Safetensors, Store)
MEASURES: dict[str, Callable[[Any], Any]] = {
    "write": lambda kind: kind.write(),
    "exact": lambda kind: kind.read(1),
    "two_level": lambda kind: kind.read(MEMORY_SHARE),
}


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(rows: int, rounds: int, shard_rows: int) -> list[dict[str, Any]]:
    acts = made_rows(rows, D_IN)
    taken: dict[tuple[str, str], list[float]] = {(kind.name, what): [] for kind in FORMATS for what in MEASURES}
    for _ in range(rounds):
        for kind in FORMATS:
            with tempfile.TemporaryDirectory() as directory:
                made = kind(Path(directory), acts, shard_rows)
                for what, work in MEASURES.items():
                    taken[kind.name, what].append(seconds_of(lambda made=made, work=work: work(made)))
    with tempfile.TemporaryDirectory() as directory:
        made = Store(Path(directory), acts, shard_rows)
        made.write()
        plan, files = made.shuffled(MEMORY_SHARE), sum(1 for path in made.path.rglob("*") if path.is_file())
        mixing = float(np.mean([plan.mixing(plan.draw(step).contexts) for step in range(8)]))
    found = []
    for kind in FORMATS:
        speed = {what: round(rows / statistics.median(taken[kind.name, what])) for what in MEASURES}
        found.append(
            {"format": kind.name, "shard_rows": shard_rows, **{f"{k}_rows_per_s": v for k, v in speed.items()}}
        )
    for entry in found:
        for what in MEASURES:
            entry[f"{what}_against_memmap"] = round(entry[f"{what}_rows_per_s"] / found[0][f"{what}_rows_per_s"], 2)
    found[-1] |= {"files": files, "parts": plan.parts, "mixing_two_level": round(mixing, 3)}
    return found


def harvest_and_writes(tokens: int) -> dict[str, Any]:
    """Rows per second of a harvest of tiny-relu-1l, and of writing its shards, which another thread does."""
    from sae import pipeline
    from sae.lm import load_model

    model, source = load_model("tiny-relu-1l"), pipeline.source_of("default")
    list(source.documents())  # the default text is made on first use
    writing: list[float] = []
    real = ActivationStore.write_shard

    def timed(self: ActivationStore, *args: Any, **how: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(self, *args, **how)
        finally:
            writing.append(time.perf_counter() - start)

    ActivationStore.write_shard = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "acts.zarr"
            seconds = seconds_of(
                lambda: pipeline.harvest(model, source, out, tokens=tokens, heldout_tokens=524_288 // 4)
            )
            store = ActivationStore.open(out)
            rows = sum(marker.rows for split in store.n_shards for marker in store.markers(split).values())
    finally:
        ActivationStore.write_shard = real  # type: ignore[method-assign]
    return {
        "rows": rows,
        "harvest_rows_per_s": round(rows / seconds),
        "write_rows_per_s": round(rows / sum(writing)),
        "writing_share_of_harvest": round(sum(writing) / seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=262_144, help="rows written and read; at least 65,536")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each format")
    parser.add_argument("--json", type=Path, help="also put the figures into this file")
    args = parser.parse_args()
    entries = [entry for shard_rows in SHARD_ROWS for entry in compare(args.rows, args.rounds, shard_rows)]
    columns = ["format", "shard_rows", "write_rows_per_s", "exact_rows_per_s", "exact_against_memmap"]
    columns += ["two_level_rows_per_s", "two_level_against_memmap", "files", "parts", "mixing_two_level"]
    print(table(columns, [[entry.get(name, "") for name in columns] for entry in entries]), flush=True)
    record(args.json, "throughput", {"rows": args.rows, "d_in": D_IN, "rounds": args.rounds, "formats": entries})
    harvest = harvest_and_writes(args.rows)
    print("\n" + table(list(harvest), [list(harvest.values())]))
    record(args.json, "writing beside the harvest", harvest)


if __name__ == "__main__":
    main()
