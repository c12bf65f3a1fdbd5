"""Measures memory and disk during long work on activation stores; prints a table, writes JSON.

    python scripts/store_memory.py ring --text FILE --minutes 20 --json docs/measurements/store-figures.json
    python scripts/store_memory.py epochs --rows 500000 --json docs/measurements/store-figures.json
    python scripts/store_memory.py epochs --rows 16384 --epochs 2                 # seconds

`ring` harvests tiny-relu-1l into a store that keeps only the latest rows, and samples the process every ten seconds.
`epochs` reads a made-up store in batches: in one permutation of all rows, and with a tenth of the memory.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_store import HOOK, made_rows, write_store
from figures import record, table

from store.activations import ActivationStore
from store.batches import ShuffledRows

SAMPLE_S = 10.0
WARM_UP_S = 300.0  # imports, the text's window, the first shards
MB = 1e6
Sample = dict[str, float]


def rss_mb(pid: int | str = "self") -> float:
    """Resident memory of a process now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB


def sampled(process: subprocess.Popen[Any], look: Callable[[], Sample], minutes: float) -> Iterator[Sample]:
    """One sample every ten seconds until the time is over or the process ends; then the process is stopped."""
    start = time.monotonic()
    while process.poll() is None and time.monotonic() - start < minutes * 60:
        yield {"seconds": round(time.monotonic() - start, 1), "rss_mb": round(rss_mb(process.pid), 1), **look()}
        time.sleep(SAMPLE_S)
    process.send_signal(signal.SIGTERM)
    process.wait()


def trend(samples: list[Sample]) -> dict[str, float]:
    """Level and slope (least squares) of memory after the warm-up."""
    late = [s for s in samples if s["seconds"] >= WARM_UP_S] or samples
    seconds, rss = (np.array([sample[name] for sample in late]) for name in ("seconds", "rss_mb"))
    slope = float(np.polyfit(seconds, rss, 1)[0]) * 60 if len(late) > 1 else 0.0
    return {
        "minutes": round(samples[-1]["seconds"] / 60, 1),
        "rss_mb_after_warm_up": float(rss[0]),
        "rss_mb_largest": float(rss.max()),
        "rss_mb_last": float(rss[-1]),
        "slope_mb_per_min": round(slope, 3),
    }


def ring(args: argparse.Namespace) -> dict[str, Any]:
    """`sae harvest --keep-rows`, stopped after `--minutes` as by Ctrl-C."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "acts.zarr"
        options = "--model tiny-relu-1l --tokens 100000000 --heldout-tokens 524288 --device cpu"
        command = [sys.executable, "-m", "sae.cli", "harvest", *options.split()]
        command += ["--text", args.text, "--keep-rows", str(args.keep_rows), "--out", str(out)]

        def look() -> Sample:
            return {
                "written_shards": sum(1 for _ in out.glob("markers/train/*.json")),
                "disk_mb": sum(file.stat().st_size for file in out.rglob("c/*/*")) / MB,
            }

        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        samples = list(sampled(process, look, args.minutes))
        store = ActivationStore.open(out)
        held = [marker for marker in store.markers("train").values() if marker.contexts]
        rows_per_shard = store.rows_per_shard
        found = {
            "exit_status": process.returncode,  # 130: stopped with everything saved
            "keep_rows": args.keep_rows,
            "rows_written": len(store.markers("train")) * rows_per_shard,
            "rows_held": sum(marker.rows for marker in held),
            "problems": [p.text for p in store.verify() if "shards are written" not in p.text],
            **trend(samples),
            "disk_mb_largest": round(max(sample["disk_mb"] for sample in samples), 1),
            "samples": samples[::6],  # one a minute
        }
    shown = {k: v for k, v in found.items() if k != "samples"}
    print(table(list(shown), [list(shown.values())]))
    return found


def epochs(args: argparse.Namespace) -> dict[str, Any]:
    """Memory at the end of each epoch of reading in batches of 4,096."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_store(Path(scratch) / "acts.zarr", made_rows(args.rows // 8192 * 8192, 512), 8192)
        for name, memory_bytes in (("exact", 1 << 30), ("two-level", args.rows * 512 * 2 // 10)):
            store = ActivationStore.open(Path(scratch) / "acts.zarr")
            rows = ShuffledRows(store, HOOK, batch_rows=4096, seed=0, memory_bytes=memory_bytes)
            ends: list[float] = []
            steps = round(rows.steps_per_epoch)
            for step in range(args.epochs * steps):
                rows.batch(step)
                if (step + 1) % steps == 0:
                    ends.append(round(rss_mb(), 1))
            found[name] = {"rows": rows.n_rows, "memory_mb": memory_bytes / MB, "rss_mb_after_epoch": ends, **rows.plan}
            del rows
    columns = ["reading", "rows", *(f"RSS after epoch {n + 1}, MB" for n in range(args.epochs))]
    print(table(columns, [[name, entry["rows"], *entry["rss_mb_after_epoch"]] for name, entry in found.items()]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ring", "epochs"], help="the measurement")
    parser.add_argument("--text", default="default", help="ring: what is harvested")
    parser.add_argument("--minutes", type=float, default=20.0, help="ring: duration")
    parser.add_argument("--keep-rows", type=int, default=2_000_000, help="ring: rows that the store keeps")
    parser.add_argument("--rows", type=int, default=500_000, help="epochs: rows of the store")
    parser.add_argument("--epochs", type=int, default=5, help="epochs: how often the rows are read")
    parser.add_argument("--json", type=Path, help="also put the figures into this file")
    args = parser.parse_args()
    measure = {"ring": ring, "epochs": epochs}[args.what]
    record(args.json, f"memory, {args.what}", measure(args))


if __name__ == "__main__":
    main()
