"""Measures the data path in one run: harvest against the bare forward pass, the store against numpy memmap and
safetensors shards, shard sizes, and reads that mix. Prints tables and writes JSON with the hardware.

usage: python scripts/bench_data.py [--rows 131072] [--d-in 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from sae import harvesting, pipeline
from sae.lm import load_model
from store.activations import ActivationStore
from store.batches import ShuffledRows

SEQ_LEN = 256
HOOK = "blocks.0.mlp.hook_post"
BATCH_ROWS = 4096


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into[name] = time.perf_counter() - start


def harvest_against_forward(tokens: int, scratch: Path) -> dict[str, Any]:
    """The same contexts through the model alone, and as a whole harvest; both exclude loading the model."""
    model = load_model("tiny-relu-1l")
    source = pipeline.source_of("default")
    seconds: dict[str, float] = {}
    list(source.documents())  # the embedded text is made on first use
    model.capture(torch.zeros((2, SEQ_LEN), dtype=torch.long), HOOK)
    with timed(seconds, "harvest"):
        out = pipeline.harvest(model, source, scratch / "harvest.zarr", tokens=tokens, heldout_tokens=16_384)
    with timed(seconds, "read and tokenise the text"):
        for document in source.documents():
            model.tokenizer.encode(document.text, add_special_tokens=False)
    store = ActivationStore.open(out)
    contexts = [store.read_contexts(split, s).tokens for split in ("heldout", "train") for s in store.markers(split)]
    with timed(seconds, "forward to the hook"):
        for part in contexts:
            harvesting._activations(model, {HOOK: store.hook_points[HOOK]}, part)
    return {
        "rows": sum(part.size for part in contexts),
        "seconds": seconds,
        "forward_share": seconds["forward to the hook"] / seconds["harvest"],
    }


def made_rows(rows: int, d_in: int) -> np.ndarray:
    return np.maximum(np.random.default_rng(0).normal(size=(rows, d_in)), 0).astype(np.float16)


def write_store(path: Path, acts: np.ndarray, shard_rows: int) -> None:
    contexts = shard_rows // SEQ_LEN
    n_shards = len(acts) // shard_rows
    store = ActivationStore.create(
        path, hook_points={"h": acts.shape[1]}, seq_len=SEQ_LEN, contexts_per_shard=contexts,
        n_shards={"heldout": 0, "train": n_shards}, dtype="float16", provenance={},
    )  # fmt: skip
    text = np.ones((contexts, SEQ_LEN), int)
    with store.hold():
        for shard in range(n_shards):
            store.write_shard(
                "train", shard, acts={"h": acts[shard * shard_rows : (shard + 1) * shard_rows]}, tokens=text,
                keep=text > 0, document=text, documents={}, cursor={},
            )  # fmt: skip


def formats(rows: int, d_in: int, shard_rows: int, scratch: Path) -> list[dict[str, Any]]:
    """Write (fsync'd), then one epoch of shuffled float32 batches, a quarter of the rows in memory at a time."""
    acts = made_rows(rows, d_in)
    memory_rows = rows // 4
    shards = rows // shard_rows

    def memmap_write() -> None:
        with open(scratch / "memmap", "wb") as file:
            file.write(acts.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def safetensors_write() -> None:
        for shard in range(shards):
            path = scratch / f"{shard}.safetensors"
            save_file({"acts": acts[shard * shard_rows : (shard + 1) * shard_rows]}, path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def pooled(read: Callable[[int], np.ndarray]) -> int:
        """What ShuffledRows does, over another format: pools of whole shards, permuted."""
        rng, seen = np.random.default_rng(1), 0
        for places in np.array_split(rng.permutation(shards), max(1, rows // memory_rows)):
            pool = np.concatenate([read(place) for place in places.tolist()])
            order = rng.permutation(len(pool))
            for start in range(0, len(pool), BATCH_ROWS):
                seen += len(pool[order[start : start + BATCH_ROWS]].astype(np.float32))
        return seen

    def store_read() -> int:
        store = ActivationStore.open(scratch / "acts.zarr")
        pools = max(1, shards // max(1, rows // memory_rows))
        source = ShuffledRows(store, "h", batch_rows=BATCH_ROWS, seed=1, pool_shards=pools)
        return sum(len(source.batch(step)) for step in range(rows // BATCH_ROWS))

    def memmap_read() -> int:
        mapped = np.memmap(scratch / "memmap", np.float16, "r", shape=(rows, d_in))
        return pooled(lambda shard: mapped[shard * shard_rows : (shard + 1) * shard_rows])

    found = []
    for name, write, read in (
        ("numpy memmap", memmap_write, memmap_read),
        (
            "safetensors shards",
            safetensors_write,
            lambda: pooled(lambda shard: load_file(scratch / f"{shard}.safetensors")["acts"]),
        ),
        ("activation store", lambda: write_store(scratch / "acts.zarr", acts, shard_rows), store_read),
    ):
        seconds: dict[str, float] = {}
        with timed(seconds, "write"):
            write()
        read()  # every format from a warm page cache
        with timed(seconds, "read"):
            assert read() >= rows - BATCH_ROWS
        found.append(
            {"format": name, "shard_rows": shard_rows, "write_rows_per_s": rows / seconds["write"],
             "read_rows_per_s": rows / seconds["read"]}
        )  # fmt: skip
    for entry in found:
        entry["read_against_memmap"] = entry["read_rows_per_s"] / found[0]["read_rows_per_s"]
    return found


def hardware() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--shard-rows", type=int, nargs="+", default=[1024, 8192, 65_536])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    result: dict[str, Any] = {"hardware": hardware(), "formats": []}
    for shard_rows in args.shard_rows:
        with tempfile.TemporaryDirectory() as scratch:
            result["formats"] += formats(args.rows, args.d_in, shard_rows, Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        result["harvest"] = harvest_against_forward(args.rows, Path(scratch))
    print(json.dumps(result["hardware"]))
    print("\n| format | rows a shard | written, rows/s (fsync'd) | shuffled reads, rows/s | against memmap |")
    print("|---|---|---|---|---|")
    for entry in result["formats"]:
        print(
            f"| {entry['format']} | {entry['shard_rows']:,} | {entry['write_rows_per_s']:,.0f} "
            f"| {entry['read_rows_per_s']:,.0f} | {entry['read_against_memmap']:.2f} |"
        )
    harvest = result["harvest"]
    print(f"\nharvest of {harvest['rows']:,} rows of tiny-relu-1l:")
    for name, seconds in harvest["seconds"].items():
        print(f"  {name:28} {seconds:7.2f} s   {harvest['rows'] / seconds:>10,.0f} rows/s")
    print(f"  the forward pass is {harvest['forward_share']:.2f} of the harvest")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
