"""Seconds per training step, ours beside the peers', interleaved in one run; prints tables and writes JSON.

    python scripts/bench.py --variants topk --d-sae 16384 --rounds 8
    python scripts/bench.py --peers DIR --variants topk,batchtopk,relu,relu-sparse

Every contender is a process that runs its own public training loop on the same in-memory batches, one step at a time in
turn. A step lasts from the loop's taking a batch to its asking for the next: optimiser, logging and counting included.
`--peers DIR` is a directory with the peers' benchmark `c_peers.py` and its environments; without it only ours run.
Variants: `relu` is the first, dense steps; `relu-sparse` a dictionary whose biases leave about 36 features active, as
training does (the peers' step costs the same in both). BENCH_MATMUL=medium gives everyone the same product back end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

D_IN, BATCH_TOKENS, K = 512, 4096, 32
NATURAL_L0 = 36
THREADS = int(os.environ.get("BENCH_THREADS", "2"))
OURS = ("monosem", "monosem-reference")
PEERS = {
    "relu": ["saelens", "dictlearn", "overcomplete"],
    "relu-sparse": ["dictlearn"],
    "topk": ["saelens", "dictlearn", "sparsify", "overcomplete"],
    "batchtopk": ["saelens", "dictlearn", "overcomplete"],
}


# --- one contender: a process that takes a step when it is told to ---


def work(who: str, variant: str, d_sae: int) -> None:
    """Our trainer, paced: reads `run N` from stdin, answers with the times of N steps."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(THREADS)
    if os.environ.get("BENCH_MATMUL"):
        torch.set_float32_matmul_precision(os.environ["BENCH_MATMUL"])
    from sae import training
    from sae.kernels.support import BatchTopK
    from sae.model import SAE
    from sae.recipes import resolve

    rows = MadeUpRows()
    pace = Pace(out)
    step, start = training.train_step, training._start

    def paced_step(*args: Any) -> Any:
        pace.turn()
        return step(*args)

    def started(*args: Any) -> Any:
        state = start(*args)
        if variant == "relu-sparse":
            x = rows.batch(0).x * state.scale
            pre = state.sae.pre_acts(x).flatten()
            rank = int((1 - NATURAL_L0 / d_sae) * len(pre))
            state.sae.b_enc.data -= pre.kthvalue(rank).values
            state.density = NATURAL_L0 / d_sae
        return state

    training.train_step, training._start = paced_step, started
    if variant == "batchtopk":
        SAE.rule = property(lambda self: BatchTopK(K))  # type: ignore[method-assign]
    sparse_k = variant in ("topk", "batchtopk")
    recipe = "topk" if sparse_k else "towards-monosemanticity"
    settings: dict[str, Any] = {"resample_shares": (), "tokens": 10**10, "d_sae": d_sae, "lr": 1e-6}
    settings |= {"k": K} if sparse_k else {"l1": 1e-3}
    recipes = training.recipe_named(recipe)
    if sparse_k:  # the start from data takes a while and changes no step
        from dataclasses import replace

        training.recipe_named = lambda name: replace(recipes, encoder_init="kaiming")
    _, config = resolve(recipe, **settings)
    with tempfile.TemporaryDirectory() as directory:
        kernels = "reference" if who.endswith("reference") else "auto"
        training.train(rows, Path(directory) / "sae", config, save_minutes=1e9, kernels=kernels)


class MadeUpRows:
    """Four batches, ReLU-MLP-like: non-negative, about 30% positive, of rank 128; as the peers' benchmark has them."""

    d_in = D_IN

    def __init__(self) -> None:
        import torch

        g = torch.Generator().manual_seed(0)
        basis = torch.randn(128, D_IN, generator=g)
        self.batches = [
            torch.relu(torch.randn(BATCH_TOKENS, 128, generator=g) @ basis / 128**0.5 - 0.5) for _ in range(4)
        ]

    def batch(self, step: int) -> Any:
        from sae.rows import Batch

        return Batch(self.batches[step % 4])

    def sample(self, n: int, seed: int) -> Any:
        return self.batches[0][:n]


class Pace:
    """Blocks the loop between turns, and reports how long each step took."""

    def __init__(self, out: Any) -> None:
        self.out, self.left, self.began, self.times = out, 0, 0.0, []

    def turn(self) -> None:
        if self.began:
            self.times.append(time.perf_counter() - self.began)
        while self.left == 0:
            peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(json.dumps({"times": self.times, "rss_gib": peak_gib}), file=self.out, flush=True)
            self.times = []
            command = sys.stdin.readline().split()
            if not command or command[0] == "quit":
                os._exit(0)
            self.left = int(command[1])
        self.left -= 1
        self.began = time.perf_counter()


# --- the driver ---


class Contender:
    """One process, told when to run."""

    def __init__(self, who: str, variant: str, d_sae: int, peers: Path | None) -> None:
        self.who = who
        env = os.environ | {
            "OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        if who in OURS:
            env["THP_MEM_ALLOC_ENABLE"] = "1"
            command = [sys.executable, __file__, "--worker", who, "--variants", variant, "--d-sae", str(d_sae)]
        else:
            assert peers is not None
            python, script = (
                peers / "envs" / f"pv_{PEER_ENVIRONMENTS.get(who, who)}" / "bin/python",
                peers / "c_peers.py",
            )
            plain = variant.removesuffix("-sparse")
            command = [str(python), str(script), "--worker", who, "--variants", plain, "--d-sae", str(d_sae),
                       "--batch", str(BATCH_TOKENS)]  # fmt: skip
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=None if who in OURS else peers,
        )  # fmt: skip
        self.alive = self._read() is not None

    def _read(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.strip() else None

    def run(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"run {steps}\n")
        self.process.stdin.flush()
        answer = self._read()
        if answer is None:
            raise RuntimeError(f"{self.who} stopped in the middle of the benchmark")
        return answer

    def quit(self) -> None:
        self.process.kill()
        self.process.wait()


PEER_ENVIRONMENTS = {"dictlearn": "dl"}


def measure(variant: str, d_sae: int, rounds: int, peers: Path | None, who: list[str]) -> list[dict[str, Any]]:
    """Seconds per step of every contender, taken in turn, after warm-up."""
    names = [name for name in [*OURS, *(PEERS[variant] if peers else [])] if not who or name in who]
    contenders = [Contender(name, variant, d_sae, peers) for name in names]
    for absent in [c for c in contenders if not c.alive]:
        print(f"{absent.who} did not start", file=sys.stderr)
    contenders = [c for c in contenders if c.alive]
    times: dict[str, list[float]] = {c.who: [] for c in contenders}
    memory = {}
    for contender in contenders:
        contender.run(3 if contender.who in OURS else 2)
    for _ in range(rounds):
        for contender in contenders:
            answer = contender.run(2 if contender.who in OURS else 1)
            times[contender.who] += answer["times"]
            memory[contender.who] = answer["rss_gib"]
    for contender in contenders:
        contender.quit()
    return [
        {"variant": variant, "d_sae": d_sae, "who": name, "seconds": taken, "rss_gib": memory[name]}
        for name, taken in times.items()
    ]


def show(found: list[dict[str, Any]]) -> None:
    best_peer = min((statistics.median(f["seconds"]) for f in found if f["who"] not in OURS), default=None)
    print(f"\n{found[0]['variant']}, d_sae {found[0]['d_sae']:,}, batch {BATCH_TOKENS:,}, d_in {D_IN}")
    print("| who | s/step min | median | max | rows/s | best peer / this | peak GiB |\n|---|--:|--:|--:|--:|--:|--:|")
    for f in sorted(found, key=lambda f: statistics.median(f["seconds"])):
        low, median, high = min(f["seconds"]), statistics.median(f["seconds"]), max(f["seconds"])
        ratio = f"{best_peer / median:.2f}" if best_peer else ""
        print(
            f"| {f['who']} | {low:.3f} | {median:.3f} | {high:.3f} | {BATCH_TOKENS / median:,.0f} | {ratio} "
            f"| {f['rss_gib']:.2f} |"
        )


def hardware() -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    import torch

    return {"cpu": model, "threads": THREADS, "torch": torch.__version__, "python": platform.python_version(),
            "commit": commit, "matmul": os.environ.get("BENCH_MATMUL", "")}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="topk,batchtopk,relu,relu-sparse", help="comma-separated")
    parser.add_argument("--d-sae", default="4096,16384", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="directory of the peers' benchmark and environments")
    parser.add_argument("--who", default="", help="only these contenders, comma-separated")
    parser.add_argument("--json", type=Path, help="write all times here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.variants, int(args.d_sae))
        return 0
    everything = []
    print(hardware())
    for variant in args.variants.split(","):
        for d_sae in map(int, args.d_sae.split(",")):
            found = measure(variant, d_sae, args.rounds, args.peers and args.peers.resolve(),
                            [name for name in args.who.split(",") if name])  # fmt: skip
            show(found)
            everything += found
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps({"hardware": hardware(), "results": everything}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
