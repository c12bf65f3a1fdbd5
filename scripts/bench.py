"""Seconds per training step, ours and the peers', interleaved in one run; prints tables, writes JSON and plots.

    python scripts/bench.py --variants topk --d-sae 16384 --rounds 8
    python scripts/bench.py --peers DIR --variants topk,batchtopk,relu,relu-sparse --json times.json
    BENCH_MATMUL=medium python scripts/bench.py --peers DIR …      # the same product back end for everyone
    python scripts/bench.py --sweep --json sweep.json --plot sweep.svg

Every contender is a process that runs its own public training loop on the same in-memory batches; they take turns, one
step at a time. A step lasts from the loop's taking a batch to its asking for the next, with optimiser, logging and
counting. `--peers DIR` is a directory with the peers' benchmark `c_peers.py` and one environment per peer,
`envs/pv_NAME`; a peer whose environment is missing is left out, with a message. Without --peers only ours run.
Variants: `relu` is the first, dense steps; `relu-sparse` a dictionary whose biases leave about 36 features active, as
after training (the peers' step costs the same in both). `monosem-bf16` rounds factors of dense products to bfloat16.
Processor seconds (of all threads) are shown next to the wall clock: on a busy machine their ratios vary less.
`--sweep` measures ours alone against d_sae, L0 and batch, with the one dense product that every step needs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
from bench_plot import line_plot
from figures import table

D_IN, BATCH_TOKENS, K = 512, 4096, 32
NATURAL_L0 = 36
THREADS = int(os.environ.get("BENCH_THREADS", "2"))
OURS = {
    "monosem": [],
    "monosem-bf16": ["--matmul", "bf16"],
    "monosem-reference": ["--kernels", "reference", "--matmul", "highest"],
}
PEERS = {
    "relu": ["saelens", "dictlearn", "overcomplete"],
    "relu-sparse": ["dictlearn"],
    "topk": ["saelens", "dictlearn", "sparsify", "overcomplete"],
    "batchtopk": ["saelens", "dictlearn", "overcomplete"],
}
PEER_ENVIRONMENTS = {"dictlearn": "dl"}
SWEEP = {
    "d_sae": [2048, 4096, 8192, 16384, 32768],
    "l0": [8, 16, 32, 64, 128, 256],
    "batch": [512, 1024, 2048, 4096, 8192],
}
SWEPT_FROM = {"d_sae": 16384, "l0": K, "batch": BATCH_TOKENS}


class Contender:
    """One process that takes steps on request."""

    def __init__(self, who: str, command: list[str], cwd: Path | None = None, **variables: str) -> None:
        self.who = who
        env = (
            os.environ
            | variables
            | {
                "OMP_NUM_THREADS": str(THREADS),
                "MKL_NUM_THREADS": str(THREADS),
                "BENCH_THREADS": str(THREADS),
                "WANDB_MODE": "disabled",
                "HF_HUB_OFFLINE": "1",
                "SPARSIFY_DISABLE_TRITON": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
        )
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
        )
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
        with self.process:  # closes its pipes and waits
            self.process.kill()


def ours(who: str, variant: str, *, d_sae: int, l0: int, batch: int, **variables: str) -> Contender:
    """Our trainer; `variables` are of its environment."""
    worker = str(Path(__file__).with_name("bench_worker.py"))
    shape = ["--variant", variant, "--d-sae", str(d_sae), "--l0", str(l0), "--batch", str(batch)]
    return Contender(who, [sys.executable, worker, *shape, *OURS.get(who, [])], **variables)


def peer(who: str, variant: str, d_sae: int, peers: Path) -> Contender:
    shape = ["--variants", variant.removesuffix("-sparse"), "--d-sae", str(d_sae), "--batch", str(BATCH_TOKENS)]
    return Contender(who, [str(python_of(who, peers)), str(peers / "c_peers.py"), "--worker", who, *shape], cwd=peers)


def python_of(who: str, peers: Path) -> Path:
    return peers / "envs" / f"pv_{PEER_ENVIRONMENTS.get(who, who)}" / "bin/python"


def installed(names: list[str], peers: Path) -> list[str]:
    """The peers whose environment is there; a line on stderr for each of the others."""
    absent = [name for name in names if not python_of(name, peers).is_file()]
    for name in absent:
        print(f"{name}: left out, its environment is missing ({python_of(name, peers)})", file=sys.stderr)
    return [name for name in names if name not in absent]


def interleaved(contenders: list[Contender], rounds: int) -> list[dict[str, Any]]:
    """Seconds per step of every contender, taken in turn, after warm-up."""
    for contender in [c for c in contenders if not c.alive]:
        print(f"{contender.who}: left out, its process did not start", file=sys.stderr)
        contender.quit()
        contenders.remove(contender)
    found = {c.who: {"who": c.who, "seconds": [], "cpu_s": [], "rss_gib": 0.0} for c in contenders}
    for contender in contenders:
        contender.run(3 if contender.who in OURS else 2)
    for _ in range(rounds):
        for contender in contenders:
            answer = contender.run(2 if contender.who in OURS else 1)
            found[contender.who]["seconds"] += answer["times"]
            found[contender.who]["cpu_s"] += [sum(used) for used in answer["cpu"]]
            found[contender.who]["rss_gib"] = answer["rss_gib"]
    for contender in contenders:
        contender.quit()
    return list(found.values())


def compare(variant: str, d_sae: int, rounds: int, peers: Path | None, who: list[str]) -> list[dict[str, Any]]:
    """Ours and the peers' at one variant and size; `who` names the contenders wanted (empty: all)."""
    l0 = NATURAL_L0 if variant.startswith("relu") else K
    mine = [name for name in OURS if name in (who or ["monosem", "monosem-bf16"])]
    contenders = [ours(name, variant, d_sae=d_sae, l0=l0, batch=BATCH_TOKENS) for name in mine]
    if peers:
        theirs = installed([name for name in PEERS[variant] if not who or name in who], peers)
        contenders += [peer(name, variant, d_sae, peers) for name in theirs]
    return [{"variant": variant, "d_sae": d_sae, **found} for found in interleaved(contenders, rounds)]


def comparison_table(found: list[dict[str, Any]]) -> str:
    """One line per contender, the fastest first."""

    def best_peer_over(f: dict[str, Any], key: str) -> str:
        best = min((statistics.median(other[key]) for other in found if other["who"] not in OURS), default=None)
        return f"{best / statistics.median(f[key]):.2f}" if best else ""

    rows = []
    for f in sorted(found, key=lambda f: statistics.median(f["seconds"])):
        low, median, high = min(f["seconds"]), statistics.median(f["seconds"]), max(f["seconds"])
        wall = [f"{low:.3f}", f"{median:.3f}", f"{high:.3f}", f"{BATCH_TOKENS / median:,.0f}"]
        cpu = [f"{statistics.median(f['cpu_s']):.3f}", best_peer_over(f, "cpu_s"), f"{f['rss_gib']:.2f}"]
        rows.append([f["who"], *wall, best_peer_over(f, "seconds"), *cpu])
    columns = ["who", "s/step min", "median", "max", "rows/s", "best peer / this", "CPU s", "best peer / this"]
    return table([*columns, "peak GiB"], rows)


# --- the cost of a step, with and without its one dense product ---


def swept(rounds: int) -> list[dict[str, Any]]:
    """Median seconds of a topk step, and of its screening product alone, against d_sae, L0 and batch size."""
    results = []
    for name, values in SWEEP.items():
        print(
            f"\ntopk step against {name}; otherwise "
            + ", ".join(f"{k} {v:,}" for k, v in SWEPT_FROM.items() if k != name)
        )
        print(f"| {name} | s/step min | median | max | µs/row | the dense product, s | the rest, s | CPU s |")
        print("|--:|--:|--:|--:|--:|--:|--:|--:|")
        for value in values:
            shape = SWEPT_FROM | {name: value}
            (found,) = interleaved([ours("monosem", "topk", **shape)], rounds)
            median, product_s = statistics.median(found["seconds"]), screening_product_s(**shape)
            print(
                f"| {value:,} | {min(found['seconds']):.3f} | {median:.3f} | {max(found['seconds']):.3f} "
                f"| {1e6 * median / shape['batch']:.1f} | {product_s:.3f} | {median - product_s:.3f} "
                f"| {statistics.median(found['cpu_s']):.3f} |",
                flush=True,
            )
            results.append({"against": name, **shape, **found, "product_s": product_s})
    return results


def screening_product_s(*, d_sae: int, l0: int, batch: int) -> float:
    """Median seconds of the product that finds the candidates, by itself."""
    import torch

    from sae.kernels.cpu_screen import Screen, prepare

    torch.set_num_threads(THREADS)
    bias = torch.zeros(d_sae)
    screen = Screen.of(torch.rand(batch, D_IN), prepare(torch.rand(d_sae, D_IN).t()), bias, bias)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        for first in range(0, batch, len(screen.buffer)):
            screen.product(first, min(batch, first + len(screen.buffer)))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def plot(results: list[dict[str, Any]]) -> str:
    """Milliseconds per step, with and without the dense product, against each of the three."""
    panels = []
    for name in SWEEP:
        points = [r for r in results if r["against"] == name]
        steps = [(r[name], 1e3 * statistics.median(r["seconds"])) for r in points]
        rest = [(x, max(0.1, y - 1e3 * r["product_s"])) for (x, y), r in zip(steps, points, strict=True)]
        panels.append((f"against {name}", {"a step, ms": steps, "without its dense product": rest}))
    return line_plot(panels)


def choices() -> dict[str, Any]:
    """The back ends that the measured steps use."""
    import torch

    from sae.kernels import choose, matmul

    torch.set_num_threads(THREADS)
    for_all = os.environ.get("BENCH_MATMUL", "")
    return {"matmul_for_all": for_all, "kernels": choose().describe(), "matmul": matmul.describe()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="topk,batchtopk,relu,relu-sparse", help="comma-separated")
    parser.add_argument("--d-sae", default="4096,16384", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contender takes")
    parser.add_argument("--peers", type=Path, help="directory of the peers' benchmark and environments")
    parser.add_argument("--who", default="", help="only these contenders, comma-separated")
    parser.add_argument("--sweep", action="store_true", help="measure cost against d_sae, L0 and batch instead")
    parser.add_argument("--json", type=Path, help="write all times here")
    parser.add_argument("--plot", type=Path, help="with --sweep: write an SVG here")
    args = parser.parse_args()
    description = machine.hardware(**choices())
    print(json.dumps(description, indent=1))
    results: list[dict[str, Any]] = []
    peers = args.peers and args.peers.resolve()
    if args.sweep:
        results = swept(args.rounds)
        if args.plot:
            args.plot.write_text(plot(results))
    else:
        for variant in args.variants.split(","):
            for d_sae in map(int, args.d_sae.split(",")):
                found = compare(variant, d_sae, args.rounds, peers, [name for name in args.who.split(",") if name])
                print(f"\n{variant}, d_sae {d_sae:,}, batch {BATCH_TOKENS:,}, d_in {D_IN}")
                print(comparison_table(found), flush=True)
                results += found
    if args.json:
        args.json.write_text(json.dumps({"hardware": description, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
