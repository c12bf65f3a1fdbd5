"""Harvest as Ray tasks: each worker writes its lanes of a store that all of them see; a failed task is started again.

usage: python harvest_ray.py WORKERS STORE [further flags of sae harvest]      (in a Ray cluster, or alone: a local one)
"""

from __future__ import annotations

import subprocess
import sys

import ray


@ray.remote(num_cpus=1, max_retries=3)  # add num_gpus=1 to give each worker a GPU
def worker(rank: int, world: int, store: str, flags: list[str]) -> None:
    """One worker: `sae` must be installed on every machine."""
    command = [sys.executable, "-m", "sae.cli", "harvest", "--out", store, "--rank", str(rank), "--world", str(world)]
    subprocess.run([*command, *flags], check=True)


def main() -> None:
    world, store, *flags = sys.argv[1:]
    ray.init()
    ray.get([worker.remote(rank, int(world), store, flags) for rank in range(int(world))])


if __name__ == "__main__":
    main()
