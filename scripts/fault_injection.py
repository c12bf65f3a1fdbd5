"""Kills writers of an activation store at random moments and counts the errors afterwards; prints a table.

    python scripts/fault_injection.py --kills 200 --pipeline-kills 10 --json docs/measurements/store-figures.json
    python scripts/fault_injection.py --kills 5 --pipeline-kills 0                            # seconds

After each SIGKILL every committed shard is read and compared with what it must hold, and no shard that was committed
before may be missing. A complete store is compared byte by byte with one that was written without interruption.
--pipeline-kills kills the `sae harvest` command itself (shipped model, default text), as one worker and as two.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from figures import record, table

from store.activations import ActivationStore

SEQ_LEN, CONTEXTS, D_IN, HOOK = 16, 4, 32, "h"
N_SHARDS = {"heldout": 64, "train": 192}


@dataclass
class Tally:
    """The counts in one row of the table."""

    writer: str
    workers: int
    kills: int = 0
    stores: int = 0
    shards_checked: int = 0
    wrong_rows: int = 0
    lost_shards: int = 0
    unequal_stores: int = 0

    @property
    def sound(self) -> bool:
        return not (self.wrong_rows or self.lost_shards or self.unequal_stores)


def create(path: Path) -> ActivationStore:
    return ActivationStore.create(
        path,
        hook_points={HOOK: D_IN},
        seq_len=SEQ_LEN,
        contexts_per_shard=CONTEXTS,
        n_shards=N_SHARDS,
        dtype="float16",
        provenance={"model": "none"},
    )


def rows_of(split: str, shard: int) -> np.ndarray:
    """What a shard must hold: a function of its split and number, never zero."""
    rng = np.random.default_rng([len(split), shard])
    return rng.uniform(0.5, 2.0, (CONTEXTS * SEQ_LEN, D_IN)).astype(np.float16)


def write(path: str, rank: int, world: int) -> None:
    """One worker: writes the missing shards of its lanes, and finishes the store when all are there."""
    store = create(Path(path))
    lanes = range(rank, 64, world)
    ones = np.ones((CONTEXTS, SEQ_LEN), int)
    with store.hold(lanes):
        for split, count in N_SHARDS.items():
            written = store.markers(split)
            for shard in range(count):
                if shard % 64 in lanes and shard not in written:
                    store.write_shard(
                        split,
                        shard,
                        acts={HOOK: rows_of(split, shard)},
                        tokens=ones * shard,
                        keep=ones > 0,
                        document=ones * shard,
                        documents={shard: ("i", "s", "d", "h")},
                        cursor={"document": shard},
                    )
    if all(len(store.markers(split)) == count for split, count in N_SHARDS.items()):
        store.finish()


def check(store: ActivationStore, known: set[tuple[str, int]], tally: Tally) -> set[tuple[str, int]]:
    """Reads every committed shard; counts rows that differ from what was written, and shards that are gone."""
    found = {(split, shard) for split in N_SHARDS for shard in store.markers(split)}
    tally.lost_shards += len(known - found)
    for split, shard in found:
        stored, text = store.read_stored(split, shard, HOOK), store.read_contexts(split, shard)
        wrong = (stored != rows_of(split, shard)).any(axis=1) | (text.tokens != shard).reshape(-1)
        tally.wrong_rows += int(wrong.sum())
        tally.shards_checked += 1
    return found


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


Writer = Callable[[str, int, int], None]


def kill_store_writers(kills: int, workers: int, seed: int, scratch: Path, writer: Writer = write) -> Tally:
    """Kills writers without a model: processes forked from one that has imported everything."""
    tally, rng = Tally("store", workers), random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["store.activations", "numpy", "zarr"])
    whole = scratch / "whole.zarr"
    if not whole.exists():
        write(str(whole), 0, 1)
    expected = files(whole)
    while tally.kills < kills:
        out, known = scratch / f"{workers}-{tally.stores}.zarr", set[tuple[str, int]]()
        while not (out / "complete.json").exists():
            running = [context.Process(target=writer, args=(str(out), rank, workers)) for rank in range(workers)]
            for process in running:
                process.start()
            before = _markers(out)
            wanted = before + rng.randrange(1, 64) if tally.kills < kills else None
            while any(process.is_alive() for process in running):
                if wanted is not None and _markers(out) >= wanted:
                    time.sleep(rng.random() * 0.01)
                    for process in running:
                        tally.kills += process.is_alive()
                        process.kill()
                    break
                time.sleep(0.001)
            for process in running:
                process.join()
            if out.exists():
                known = check(ActivationStore.open(out), known, tally)
        tally.stores += 1
        tally.unequal_stores += files(out) != expected
        shutil.rmtree(out)
    return tally


def kill_harvests(kills: int, workers: int, seed: int, scratch: Path) -> Tally:
    """Kills the `sae harvest` command, which runs a model and a tokenizer."""
    tally, rng = Tally("sae harvest", workers), random.Random(seed)
    options = "--model tiny-relu-1l --text default --tokens 131072 --heldout-tokens 16384 --device cpu"
    command = [sys.executable, "-m", "sae.cli", "harvest", *options.split(), "--out"]
    whole, out = scratch / "harvest.zarr", scratch / f"harvest-{workers}.zarr"
    if not whole.exists():
        subprocess.run([*command, str(whole)], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    expected = files(whole)
    reference = ActivationStore.open(whole)
    hook = next(iter(reference.hook_points))
    total = sum(reference.n_shards.values())
    known: set[tuple[str, int]] = set()
    while not (out / "complete.json").exists():
        running = [
            subprocess.Popen(
                [*command, str(out), "--rank", str(rank), "--world", str(workers)],
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            for rank in range(workers)
        ]
        share = max(1, (total - _markers(out)) // (kills - tally.kills + 1)) if tally.kills < kills else None
        wanted = None if share is None else _markers(out) + rng.randrange(1, share + 1)
        _kill_when(lambda n=wanted: n is not None and _markers(out) >= n, running, rng, tally)
        store = ActivationStore.open(out)
        found = {(split, shard) for split in N_SHARDS for shard in store.markers(split)}
        tally.lost_shards += len(known - found)
        for split, shard in found - known:
            same = store.read_stored(split, shard, hook) == reference.read_stored(split, shard, hook)
            tally.wrong_rows += int((~same.all(axis=1)).sum())
            tally.shards_checked += 1
        known = found
    tally.stores = 1
    tally.unequal_stores = int(files(out) != expected)
    return tally


def _kill_when(
    reached: Callable[[], bool], running: list[subprocess.Popen[bytes]], rng: random.Random, tally: Tally
) -> None:
    while any(process.poll() is None for process in running):
        if reached():
            time.sleep(rng.random() * 0.05)
            for process in running:
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
                    tally.kills += 1
            break
        time.sleep(0.01)
    for process in running:
        process.wait()


def _markers(path: Path) -> int:
    return sum(1 for _ in path.glob("markers/*/*.json"))


def shown(tallies: list[Tally]) -> str:
    names = {field.name: field.name.replace("_", " ") for field in fields(Tally)}
    return table(list(names.values()), [[getattr(tally, name) for name in names] for tally in tallies])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="number of kills of writers without a model")
    parser.add_argument("--pipeline-kills", type=int, default=10, help="number of kills of `sae harvest`")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--json", type=Path, help="also put the figures into this file")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="writers at once; one row each")
    args = parser.parse_args()
    tallies = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for kills, kill in ((args.kills, kill_store_writers), (args.pipeline_kills, kill_harvests)):
            for workers in args.workers if kills else ():
                tallies.append(kill(kills, workers, args.seed, scratch))
                print(tallies[-1], file=sys.stderr, flush=True)
    print(shown(tallies))
    for section, of in (("kills of store writers", "store"), ("kills of sae harvest", "sae harvest")):
        if found := [asdict(tally) for tally in tallies if tally.writer == of]:
            record(args.json, section, found)
    return 0 if all(tally.sound for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
