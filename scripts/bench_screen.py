"""What the format of the CPU screen costs: float32, int8 or bfloat16 products, by themselves and in a training step.

    python scripts/bench_screen.py --rounds 9 --json screen.json            # BENCH_THREADS=1 for one thread

The formats take turns, so that other load on the machine falls on all of them alike; processor seconds (user and
system) are shown next to the wall clock. Part `select` times one selection and what it consists of, and counts the
exact products per row that the format's rounding leaves to do. Part `step` runs the whole trainer in processes whose
oneDNN is limited to an older processor (ONEDNN_MAX_CPU_ISA), so that each chooses its format as that processor would.
A format that this processor does not multiply directly is left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import machine
import torch
from bench_worker import MadeUpRows
from figures import table

from sae.kernels import cpu, cpu_loops
from sae.kernels.cpu_screen import Screen, prepare_in
from sae.kernels.processor import instructions
from sae.kernels.sparsity import TopK

FORMATS = {  # format: (the instruction set it needs, the limit that makes oneDNN a processor which chooses it)
    "float32": ("avx2", "AVX512_CORE"),
    "int8": ("avx512_vnni", "AVX512_CORE_VNNI"),
    "bfloat16": ("avx512_bf16", ""),
}
PARTS = ("round the encoder", "round the rows", "product", "select")


def formats() -> list[str]:
    """Those that this processor multiplies directly."""
    return [name for name, (needed, _) in FORMATS.items() if needed in instructions()]


# --- one selection ---------------------------------------------------------------------------------------------------


def selections(d_sae: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Times of each part of a topk selection in each format, and its exact products per row."""
    g = torch.Generator().manual_seed(1)
    rows = MadeUpRows(batch).batches[0]
    x = (rows - rows.mean(0)) * (bench.D_IN / rows.pow(2).sum(-1).mean()) ** 0.5
    W, bias = torch.randn(d_sae, bench.D_IN, generator=g) / bench.D_IN**0.5, torch.zeros(d_sae)
    found = [{"format": name, "d_sae": d_sae, "batch": batch, "times": {p: [] for p in PARTS}} for name in formats()]
    for turn in range(rounds + 1):
        for of in found:
            timed = parts_of_a_selection(getattr(torch, of["format"]), x, W, bias)
            of["exact_products_per_row"] = timed.pop("tried") / batch
            if turn:  # the first is a warm-up
                for part, seconds in timed.items():
                    of["times"][part].append(seconds)
    return found


def parts_of_a_selection(dtype: torch.dtype, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor) -> dict[str, Any]:
    encoder, encoder_s = measured(lambda: prepare_in(dtype, W.t()))
    screen, rows_s = measured(lambda: Screen.of(x, encoder, bias, bias))
    starts = range(0, len(x), len(screen.buffer))
    _, product_s = measured(lambda: [screen.product(i, min(len(x), i + len(screen.buffer))) for i in starts])
    tried, choose = [], cpu_loops.choose

    def counting(*arguments: Any) -> None:
        choose(*arguments)
        tried.append(arguments[-1])

    cpu_loops.choose = counting
    try:
        _, select_s = measured(lambda: cpu.select(x, encoder, bias, TopK(bench.K)))
    finally:
        cpu_loops.choose = choose
    return {**dict(zip(PARTS, (encoder_s, rows_s, product_s, select_s), strict=True)), "tried": int(tried[-1].sum())}


def measured(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """The result, and (wall clock, processor) seconds."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    result = work()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return result, (wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def selection_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for of in found:
        for part in PARTS:
            pairs = [zip(*f["times"][part], strict=True) for f in (found[0], of)]
            (_, base_cpu), (wall, used) = (tuple(map(list, pair)) for pair in pairs)
            ratio = f"{statistics.median(a / max(b, 1e-9) for a, b in zip(base_cpu, used, strict=True)):.2f}"
            counted = f"{of['exact_products_per_row']:.0f}" if part == "select" else ""
            rows.append([of["format"], part, *low_median_high(wall), *low_median_high(used), ratio, counted])
    wall_and_cpu = [f"{clock} {which}" for clock in ("ms", "CPU ms") for which in ("min", "median", "max")]
    return table(["format", "part", *wall_and_cpu, "float32 / this, CPU", "exact products a row"], rows)


def low_median_high(seconds: list[float]) -> list[str]:
    return [f"{1e3 * value:.1f}" for value in (min(seconds), statistics.median(seconds), max(seconds))]


# --- a training step -------------------------------------------------------------------------------------------------


def steps(variant: str, d_sae: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds per step of the whole trainer with each format."""
    l0 = bench.NATURAL_L0 if variant.startswith("relu") else bench.K
    shape: dict[str, Any] = {"d_sae": d_sae, "l0": l0, "batch": batch}
    contenders = [bench.ours(name, variant, **shape, ONEDNN_MAX_CPU_ISA=FORMATS[name][1]) for name in formats()]
    return [{"variant": variant, **shape, **found} for found in bench.interleaved(contenders, rounds)]


def step_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for of in found:
        ratio = statistics.median(a / b for a, b in zip(found[0]["cpu_s"], of["cpu_s"], strict=True))
        rows.append([of["who"], *low_median_high(of["seconds"]), *low_median_high(of["cpu_s"]), f"{ratio:.2f}"])
    wall_and_cpu = [f"{clock} {which}" for clock in ("ms", "CPU ms") for which in ("min", "median", "max")]
    return table(["format", *wall_and_cpu, "float32 / this, CPU"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="select,step", help="select, step or both, comma-separated")
    parser.add_argument("--variants", default="topk", help="kinds of step, as in bench.py, comma-separated")
    parser.add_argument("--d-sae", default="4096,16384", help="numbers of features, comma-separated")
    parser.add_argument("--batch", type=int, default=bench.BATCH_TOKENS, help="rows per step")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each format takes")
    parser.add_argument("--json", type=Path, help="write all times here")
    args = parser.parse_args()
    torch.set_num_threads(bench.THREADS)
    description = machine.hardware(formats=formats())
    print(json.dumps(description, indent=1))
    results: dict[str, list[dict[str, Any]]] = {"select": [], "step": []}
    for d_sae in map(int, args.d_sae.split(",")):
        if "select" in args.parts:
            results["select"] += (found := selections(d_sae, args.batch, args.rounds))
            print(f"\ntopk selection, d_sae {d_sae:,}, batch {args.batch:,}\n{selection_table(found)}", flush=True)
        for variant in args.variants.split(",") if "step" in args.parts else []:
            results["step"] += (found := steps(variant, d_sae, args.batch, args.rounds))
            print(f"\n{variant} step, d_sae {d_sae:,}, batch {args.batch:,}\n{step_table(found)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"hardware": description, **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
