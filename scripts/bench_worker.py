"""Our trainer as a contender of `bench.py`: the real loop on batches in memory, which takes steps on request.

    python scripts/bench_worker.py --variant topk --d-sae 16384      # then lines `run N` on stdin; answers are JSON

The peers' own driver (`c_peers.py --who …`) speaks the same protocol. Two environment variables: BENCH_THREADS (2) and
BENCH_MATMUL (`medium` is the product back end of the peers, used whatever its error here).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sae.dictionary.autoencoder import SAE
from sae.training import loop
from sae.training.initialise import kaiming_
from sae.training.recipes import RECIPES, resolve
from sae.training.rows import Batch

D_IN = 512
VARIANTS = {
    "topk": "topk",
    "batchtopk": "batch-topk",
    "relu": "towards-monosemanticity",
    "relu-sparse": "towards-monosemanticity",
}


@dataclass(frozen=True)
class Work:
    """The shape of the step; `l0` is k, or the number of features that `relu-sparse` leaves active."""

    variant: str
    d_sae: int
    l0: int
    batch_tokens: int
    kernels: str = "auto"
    matmul: str = "auto"


class MadeUpRows:
    """Four batches like a ReLU MLP's: non-negative, about 30% positive, of rank 128, as in the peers' benchmark."""

    d_in = D_IN

    def __init__(self, batch_tokens: int) -> None:
        g = torch.Generator().manual_seed(0)
        basis = torch.randn(128, D_IN, generator=g)
        self.batches = [
            torch.relu(torch.randn(batch_tokens, 128, generator=g) @ basis / 128**0.5 - 0.5) for _ in range(4)
        ]

    def batch(self, step: int) -> Batch:
        return Batch(self.batches[step % 4])

    def sample(self, n: int, seed: int) -> torch.Tensor:
        return self.batches[0][:n]


class Pace:
    """Blocks the loop between turns and reports each step's wall-clock time and (user, system) processor seconds."""

    def __init__(self, out: Any) -> None:
        self.out, self.left, self.began = out, 0, 0.0
        self.times: list[float] = []
        self.cpu: list[tuple[float, float]] = []

    def turn(self) -> None:
        if self.began:
            used = resource.getrusage(resource.RUSAGE_SELF)
            self.times.append(time.perf_counter() - self.began)
            self.cpu.append((used.ru_utime - self.used.ru_utime, used.ru_stime - self.used.ru_stime))
        while self.left == 0:
            peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            answer = {"times": self.times, "rss_gib": peak_gib, "cpu": self.cpu}
            print(json.dumps(answer), file=self.out, flush=True)
            self.times, self.cpu = [], []
            command = sys.stdin.readline().split()
            if not command or command[0] == "quit":
                os._exit(0)
            self.left = int(command[1])
        self.left -= 1
        self.used, self.began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()


def work(wanted: Work, out: Any) -> None:
    """Trains until it is stopped. Only the initialisation differs: it is quick, and for `relu-sparse` sparse."""
    pace, step = Pace(out), loop.train_step

    def paced_step(*args: Any) -> Any:
        pace.turn()
        return step(*args)

    def quick_start(sae: SAE, sample: torch.Tensor, *others: Any) -> None:
        kaiming_(sae, sample, *others)
        if wanted.variant == "relu-sparse":  # as after training: biases that leave l0 features active
            with torch.no_grad():
                pre = sae.pre_acts(sample[:256]).flatten()
                sae.b_enc -= pre.kthvalue(round((1 - wanted.l0 / wanted.d_sae) * len(pre))).values

    loop.train_step = paced_step
    recipe = VARIANTS[wanted.variant]
    RECIPES[recipe] = replace(RECIPES[recipe], initialise=quick_start)
    settings: dict[str, Any] = {"resample_shares": (), "tokens": 10**11, "d_sae": wanted.d_sae, "lr": 1e-6}
    settings |= {"batch_tokens": wanted.batch_tokens, "matmul": wanted.matmul}
    settings |= {"l1": 1e-3} if wanted.variant.startswith("relu") else {"k": wanted.l0}
    _, config = resolve(recipe, **settings)
    with tempfile.TemporaryDirectory() as directory:
        rows = MadeUpRows(wanted.batch_tokens)
        loop.train(rows, Path(directory) / "sae", config, save_minutes=1e9, kernels=wanted.kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="topk", choices=list(VARIANTS), help="kind of step")
    parser.add_argument("--d-sae", type=int, default=4096, help="number of features")
    parser.add_argument("--l0", type=int, default=32, help="active features per row")
    parser.add_argument("--batch", type=int, default=4096, help="rows per step")
    parser.add_argument("--kernels", default="auto", help="back end, as in sae train")
    parser.add_argument("--matmul", default=os.environ.get("BENCH_MATMUL", "auto"), help="dense products")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output must not mix with the answers
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    work(Work(args.variant, args.d_sae, args.l0, args.batch, args.kernels, args.matmul), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
