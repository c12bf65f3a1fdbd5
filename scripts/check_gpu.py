"""Checks and measures the fixed-shape training step on a CUDA device, in at most eight minutes.

    python scripts/check_gpu.py --json gpu.json
    TRITON_INTERPRET=1 python scripts/check_gpu.py --json rehearsal.json --rehearse      # tiny, on a CPU: no figures

Stages, the most important first; each writes its findings to the JSON file at once, also when it fails:

- machine: what it is, and its rates;
- tests: `pytest -m cuda` in `tests/cuda`, whose conftest needs nothing but pytest and torch;
- twin: fixed steps against general steps of the same run, at four sizes and for every recipe that has fixed steps;
- capture: 20 steps without a synchronisation, a graph against the same launches one by one, two runs bit for bit;
- sanitizer: compute-sanitizer, where it is installed, on a small twin;
- bench: every recipe at d_in 512 and d_sae 16,384; topk and batch-topk at six sizes, and in bfloat16; peers in turn;
- sparsify: its own trainer, at two sizes, with Adam and with its default optimiser;
- profile: the kernels' own times at two sizes;
- begin: seconds to the first weights of the largest dictionary, and to a saved state;
- train: a whole run, as `sae train` takes it, on the rows of a store that lie on the device, as a share of the step's
  speed.

Needs what `scripts/bench_gpu.py` needs. Other packages may be in a folder of PYTHONPATH: `tests` tests more with zarr,
google-crc32c and tokenizers, and skips what they are needed for; a peer that is not installed is named and left out.
sparsify's trainer (the package eai-sparsify) gets an environment of its own where pip reaches a package index.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_gpu  # makes this source tree importable
import machine

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(512, 16384), (4096, 65536), (512, 65536), (4096, 16384), (512, 131072), (4096, 131072)]
TWIN_SIZES = [(64, 1024, 4), (512, 16384, 32), (1000, 5000, 20), (4096, 16384, 32)]
RECIPES = ["topk", "topk, some dead", "batch-topk", "batch-topk, some dead", "balanced", "matryoshka"]
RECIPES += ["jumprelu", "anthropic-2024-04", "gated", "p-anneal", "towards-monosemanticity"]
RECIPES += ["jumprelu, dense", "gated, dense", "towards-monosemanticity, dense"]
BATCHES, STEPS, DEAD_TOKENS = 4, 20, 10**9
IN_TURN = 200  # steps of each contender at the first size
BENCHED = [  # recipe, settings, at how many of the sizes
    *((recipe, {}, 1) for recipe in RECIPES if recipe not in ("topk", "batch-topk")),
    ("topk", {}, len(SIZES)),
    ("batch-topk", {}, len(SIZES)),
    ("topk", {"precision": "bf16"}, len(SIZES)),
    ("batch-topk", {"precision": "bf16"}, 1),
]


class Setting:
    """Where it runs, and how large."""

    def __init__(self, *, rehearsal: bool) -> None:
        self.rehearsal, self.device = rehearsal, "cpu" if rehearsal else "cuda"
        self.rows, self.k = (8, 1) if rehearsal else (4096, 32)
        self.sizes = [(8, 40)] if rehearsal else SIZES
        self.twin_sizes = [(8, 40, 1)] if rehearsal else TWIN_SIZES
        self.steps = 1 if rehearsal else STEPS
        self.benched = BENCHED[:1] + BENCHED[-2:-1] if rehearsal else BENCHED

    def batches(self, d_in: int) -> list[Any]:
        import torch

        if not self.rehearsal:
            return bench_gpu.made_up(d_in, self.rows)
        return [torch.randn(self.rows, d_in, generator=torch.Generator().manual_seed(n)) for n in range(BATCHES)]

    def run(self, recipe: str, d_in: int, d_sae: int, k: int, **more: Any) -> tuple[list[Any], Any, Callable[[], Any]]:
        """Batches, the configuration, and a function that starts the run anew."""
        from dataclasses import replace

        from sae.kernels import choose
        from sae.training import fixed_plan, state
        from sae.training.initialise import kaiming_
        from sae.training.recipes import RECIPES as RECIPES_BY_NAME
        from sae.training.recipes import resolve

        batches = self.batches(d_in)
        recipe, _, kind = recipe.partition(", ")
        settings = {"d_sae": d_sae, "tokens": self.rows * 4000, "batch_tokens": self.rows, "lr": 1e-4, **more}
        settings |= {"k": k} if "k" in RECIPES_BY_NAME[recipe].settings else {"target_l0": k}
        settings |= {"p_from_share": 0.0} if recipe == "p-anneal" else {}
        found, config = resolve(recipe, **settings, dead_tokens=DEAD_TOKENS)
        found = replace(found, initialise=kaiming_)  # the start from data takes long and changes no step
        if self.rehearsal:
            fixed_plan.runs_on = lambda device: True
        kernels = choose("triton", self.device)

        def start() -> Any:
            begun = state.start(bench_gpu.HeldRows(batches), config, found, kernels, self.device)
            if kind == "some dead":
                begun.tokens_since_fired[::8] = 2 * DEAD_TOKENS  # those that fire come back to life
            if not config.k and kind != "dense":
                make_sparse(begun, batches[0], k)
            return begun

        return batches, config, start

    def seconds_of(self, work: Callable[[], Any], times: int) -> list[float]:
        if not self.rehearsal:
            return bench_gpu.seconds_of(work, times)
        found = []
        for _ in range(times):
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
        return found


def make_sparse(state: Any, x: Any, l0: int) -> None:
    """About `l0` active features in a row from the first step on, where usually it takes a while."""
    import torch

    with torch.no_grad():
        pre = state.sae.pre_acts(x[:256].to(state.device) * state.scale).flatten()
        bar = pre.topk(l0 * min(256, len(x))).values.min()
        if state.sae.activation == "jumprelu":
            state.sae.threshold.fill_(bar)
        else:
            state.sae.b_enc -= bar
        state.density = l0 / state.sae.d_sae


# --- stages: each returns what it found ------------------------------------------------------------------------------


def about_the_machine(setting: Setting) -> dict[str, Any]:
    if setting.rehearsal:
        return machine.hardware(rehearsal=True)
    import triton

    copy, product = bench_gpu.rates()
    rates = {"copy_gb_per_s": round(copy / 1e9), "float16_tflop_per_s": round(product / 1e12)}
    return machine.hardware(triton=triton.__version__, **rates)


def tests(setting: Setting) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "--durations=5", "-rs"]
    command += ["--confcutdir=tests/cuda", "tests/cuda"]
    if not setting.rehearsal and find_spec("xdist"):
        command += ["--numprocesses", "6"]  # most of the time goes to compiling kernels
    environment = os.environ | ({"MONOSEM_REHEARSAL": "1"} if setting.rehearsal else {})
    timeout_s = 900 if setting.rehearsal else 150
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-1300:]}")
    return {"status": done.returncode, "end": done.stdout[-2000:]}


def twin(setting: Setting) -> dict[str, Any]:
    """The relative difference of every parameter after six steps, and whether each step was taken in fixed shapes."""
    import torch

    from sae.training.fixed_steps import FixedSteps
    from sae.training.rows import Batch
    from sae.training.step import train_step

    found = {}
    for recipe in RECIPES:
        for d_in, d_sae, k in setting.twin_sizes if recipe == "topk" else setting.twin_sizes[:2]:
            batches, config, start = setting.run(recipe, d_in, d_sae, k)
            one, other = start(), start()
            fixed = FixedSteps(other, config)
            for step in range(6 if not setting.rehearsal else 2):
                batch = Batch(batches[step % BATCHES])
                train_step(one, batch, config)
                fixed.take(batch)
            fixed.settle()
            theirs = other.sae.tensors()
            found[f"{recipe} {d_in} {d_sae}"] = {
                "relative": {n: float((theirs[n] - t).norm() / t.norm()) for n, t in one.sae.tensors().items()},
                "counts equal": bool(torch.equal(one.tokens_since_fired, other.tokens_since_fired)),
                "all fixed": all_fixed(fixed),
            }
            if "dense" not in recipe:
                room = {"most candidates": int(fixed.made.buffers.count.max()), "room": fixed.made.sizes.room}
                found[f"{recipe} {d_in} {d_sae}"] |= room
    return found


def all_fixed(steps: Any) -> bool:
    """Whether no step was a general one: none halted, and the last one was counted on the device."""
    return bool(steps.plan.resume_at == 0 and steps.made.buffers.steps_done.item() == steps.state.step)


def capture(setting: Setting) -> dict[str, Any]:
    import torch

    from sae.kernels.triton_step.graph import captured
    from sae.training.fixed_steps import FixedSteps
    from sae.training.rows import Batch

    found = {}
    for recipe in RECIPES:
        results = []
        d_in, d_sae = setting.sizes[0]
        batches, config, start = setting.run(recipe, d_in, d_sae, setting.k)
        for how in (lambda step: step.run, captured, captured):
            state = start()
            fixed = FixedSteps(state, config, how)
            fixed.take(Batch(batches[0]))  # makes the buffers and compiles
            fixed.settle()
            if not setting.rehearsal:
                torch.cuda.set_sync_debug_mode("error")
            try:
                for step in range(1, max(2, setting.steps)):
                    fixed.take(Batch(batches[step % BATCHES]))
            finally:
                if not setting.rehearsal:
                    torch.cuda.set_sync_debug_mode("default")
            fixed.settle()
            results.append([tensor.clone() for tensor in state.sae.tensors().values()])
        launched, first, second = results
        found[recipe] = {
            "graph as launches": all(torch.equal(a, b) for a, b in zip(launched, first, strict=True)),
            "twice the same bits": all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
        }
    return found


def sanitizer(setting: Setting) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None or setting.rehearsal:
        return {"skipped": "compute-sanitizer is not installed" if tool is None else "rehearsal"}
    command = [tool, "--tool", "memcheck", sys.executable, __file__, "--only", "small-twin"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return {"status": done.returncode, "end": (done.stdout + done.stderr)[-1500:]}


def bench(setting: Setting, deadline: float, save: Callable[[str, Any], None]) -> None:
    """Milliseconds a step, contenders in turn, and the largest memory."""
    cases = [(recipe, *size, more) for recipe, more, n in setting.benched for size in setting.sizes[:n]]
    for recipe, d_in, d_sae, more in sorted(cases, key=lambda case: setting.sizes.index(case[1:3])):
        name = " ".join(["bench", recipe, str(d_in), str(d_sae), *more.values()])
        if time.monotonic() > deadline:
            save(name, {"skipped": "no time left"})
            continue
        try:
            save(name, times(setting, recipe, d_in, d_sae, **more))
        except Exception:
            save(name, {"failed": traceback.format_exc()[-1500:]})


def times(setting: Setting, recipe: str, d_in: int, d_sae: int, **more: Any) -> dict[str, Any]:
    import torch

    from sae.training.fixed_steps import FixedSteps
    from sae.training.rows import Batch
    from sae.training.step import train_step

    if not setting.rehearsal:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches, config, start = setting.run(recipe, d_in, d_sae, setting.k, **more)
    state, place = start(), iter(range(10**9))
    fixed, first_size = FixedSteps(state, config), (d_in, d_sae) == setting.sizes[0]
    who: dict[str, Callable[[], Any]] = {"monosem": lambda: fixed.take(Batch(batches[next(place) % BATCHES]))}
    setting.seconds_of(who["monosem"], setting.steps)
    fixed.settle()
    began, in_a_row = time.perf_counter(), setting.steps * (1 if setting.rehearsal else 10)
    for _ in range(in_a_row):
        who["monosem"]()
    fixed.settle()
    found: dict[str, Any] = {"monosem, in a row, ms": 1000 * (time.perf_counter() - began) / in_a_row}
    found["all fixed"] = all_fixed(fixed)
    if not setting.rehearsal:
        found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    if first_size:
        general = start()
        who["general step"] = lambda: train_step(general, Batch(batches[next(place) % BATCHES]), config)
    if recipe in ("topk", "batch-topk") and not more and not setting.rehearsal:
        who |= peers(recipe.replace("-", ""), d_in, d_sae, setting.k, batches, found)
    taken: dict[str, list[float]] = {name: [] for name in who}
    for step in who.values():
        setting.seconds_of(step, 1 if setting.rehearsal else 3)
    for _ in range(IN_TURN if first_size and not setting.rehearsal else setting.steps):
        for name, step in who.items():
            taken[name] += setting.seconds_of(step, 1)
    return found | {f"{name}, ms": round(1000 * statistics.median(each), 3) for name, each in taken.items()}


def peers(
    variant: str, d_in: int, d_sae: int, k: int, batches: list[Any], found: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """The contenders that fit and are installed; the others are named in `found`."""
    who: dict[str, Callable[[], Any]] = {}
    dense = bench_gpu.dense_torch
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "dense torch bf16": lambda: dense(variant, d_in, d_sae, k, batches, bfloat16=True),
        "dense torch bf16 compiled": lambda: dense(variant, d_in, d_sae, k, batches, bfloat16=True, compiled=True),
        "sparsify": lambda: bench_gpu.sparsify(variant, d_in, d_sae, k, batches),
    }
    for name, make in makers.items():
        try:
            step = make()
            step()
            who[name] = step
        except Exception as error:  # a peer that cannot run here is no reason to lose our figures
            found[f"{name}, problem"] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return who


def sparsify(setting: Setting) -> dict[str, Any]:
    """Milliseconds a step of sparsify's own trainer, which cannot take turns with others: its loop is its own."""
    with tempfile.TemporaryDirectory() as home:
        python, environment, problem = with_sparsify(Path(home))
        if problem:
            return {"skipped": problem}
        found: dict[str, Any] = {}
        if setting.rehearsal:
            environment["SPARSIFY_DISABLE_TRITON"] = "1"
        for d_in, d_sae in setting.sizes[:2]:
            for optimizer in ("adam", "signum"):
                command = [python, str(ROOT / "scripts" / "peers" / "time_sparsify.py"), "--device", setting.device]
                for name, value in (("d-in", d_in), ("d-sae", d_sae), ("k", setting.k), ("batch", setting.rows)):
                    command += [f"--{name}", str(value)]
                command += ["--optimizer", optimizer, "--steps", "4" if setting.rehearsal else "120"]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
                if done.returncode:
                    raise RuntimeError(f"sparsify's trainer ended with {done.returncode}: {done.stderr[-1000:]}")
                took = json.loads(done.stdout.splitlines()[-1])
                ms = took.pop("ms")
                found[f"{d_in} {d_sae} {optimizer}"] = {"ms": statistics.median(ms[len(ms) // 4 :]), **took}
        return found


def with_sparsify(home: Path) -> tuple[str, dict[str, str], str]:
    """An interpreter that can import sparsify, the variables to start it with, or why there is none."""
    environment = dict(os.environ)
    if find_spec("sparsify"):
        return sys.executable, environment, ""
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if "-packages" in path)  # torch from here
    python = home / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--retries", "0", "--timeout", "5", "eai-sparsify"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True, timeout=60)
        done = subprocess.run(install, env=environment, capture_output=True, text=True, timeout=120)
    except (subprocess.SubprocessError, OSError) as error:
        return "", {}, f"eai-sparsify could not be installed: {error}"
    reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return str(python), environment, f"eai-sparsify could not be installed: {reason[0]}" if done.returncode else ""


def profile(setting: Setting) -> dict[str, Any]:
    """Microseconds a step, by kernel."""
    if setting.rehearsal:
        return {"skipped": "rehearsal"}
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from sae.training.fixed_steps import FixedSteps
    from sae.training.rows import Batch

    found = {}
    for recipe, (d_in, d_sae) in (("topk", SIZES[0]), ("topk", SIZES[1]), ("balanced", SIZES[0])):
        batches, config, start = setting.run(recipe, d_in, d_sae, setting.k)
        fixed = FixedSteps(start(), config)
        for step in range(10):
            fixed.take(Batch(batches[step % BATCHES]))
        fixed.settle()
        with profiled(activities=[ProfilerActivity.CUDA]) as taken:
            for step in range(10):
                fixed.take(Batch(batches[step % BATCHES]))
            fixed.settle()
        times = {event.key[:60]: round(event.self_device_time_total / 10, 1) for event in taken.key_averages()}
        found[f"{recipe} {d_in} {d_sae}"] = times
    return found


def begin(setting: Setting) -> dict[str, Any]:
    """Seconds to make a dictionary from data, where it is trained, and to take a snapshot of it and to write that."""
    import torch

    from sae.kernels import choose
    from sae.training import state
    from sae.training.recipes import resolve
    from sae.training.snapshots import Snapshots

    d_in, d_sae = setting.sizes[-1]
    found, config = resolve("topk", d_sae=d_sae, tokens=setting.rows * 4000, batch_tokens=setting.rows, k=setting.k)
    rows, place = bench_gpu.HeldRows(setting.batches(d_in)), torch.device(setting.device)
    began = time.perf_counter()
    made = state.start(rows, config, found, choose("triton", setting.device), place)
    seconds = {"from data": time.perf_counter() - began}
    snapshots = Snapshots(place)
    with tempfile.TemporaryDirectory() as out:
        for name in ("snapshot with new memory", "snapshot"):
            began = time.perf_counter()
            state.save_state(Path(out), made, snapshots=snapshots)
            seconds[name] = time.perf_counter() - began
            snapshots.wait()
            seconds[f"{name}, written"] = time.perf_counter() - began
    snapshots.close()
    return {"d_in": d_in, "d_sae": d_sae, "s": {name: round(each, 3) for name, each in seconds.items()}}


class MadeUpStore:
    """What `store.batches.ShuffledRows` asks of a store: float16 rows, in shards that take no time to read."""

    path, seq_len, dtype = "made up", 128, {"x": "float16"}

    def __init__(self, d_in: int, shards: int, contexts: int) -> None:
        import numpy as np

        self.hook_points, self.shards, self.contexts = {"x": d_in}, shards, contexts
        self._rows = np.random.default_rng(0).standard_normal((contexts * self.seq_len, d_in)).astype(np.float16)

    def markers(self, split: str) -> dict[int, Any]:
        rows = len(self._rows)
        return {n: SimpleNamespace(kept_rows=rows, contexts=self.contexts) for n in range(self.shards)}

    def first_context(self, split: str, shard: int) -> int:
        return shard * self.contexts

    def read_keep(self, split: str, shard: int) -> Any:
        import numpy as np

        return np.ones((self.contexts, self.seq_len), bool)

    def read_stored(self, split: str, shard: int, hook_point: str) -> Any:
        import numpy as np

        return np.roll(self._rows, shard, axis=1)


class StoredRows:
    """The rows of a made-up store, on the device."""

    def __init__(self, source: Any, device: Any) -> None:
        from sae.pipeline.resident_rows import ResidentRows

        self._rows, self.d_in = ResidentRows(source, device, everything=True), source.d_in
        self.sample = lambda n, seed: self._rows.sample(min(n, source.n_rows), seed)

    def batch(self, step: int) -> Any:
        from sae.training.rows import Batch

        x, mixing = self._rows.batch(step)
        return Batch(x, mixing=mixing)


def train(setting: Setting, said: dict[str, Any]) -> dict[str, Any]:
    """Rows per second of a whole run on rows that lie on the device: the median over the lines of its log."""
    import torch

    from sae.training import loop
    from sae.training.recipes import resolve

    bench_gpu.stand_in_for_stores()
    from store.batches import ShuffledRows

    d_in, d_sae = setting.sizes[0]
    shards, contexts, steps = (3, 2, 4) if setting.rehearsal else (64, 256, 3000)
    source = ShuffledRows(MadeUpStore(d_in, shards, contexts), "x", batch_rows=setting.rows, seed=0)  # type: ignore[arg-type]
    settings = {"tokens": setting.rows * steps, "batch_tokens": setting.rows, "k": setting.k, "resample_shares": ()}
    _, config = resolve("topk", d_sae=d_sae, dead_tokens=10**9, **settings)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        rows = StoredRows(source, torch.device(setting.device))
        loop.train(rows, out, config, kernels="triton", device=setting.device)
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    found = {
        "rows": source.n_rows,
        "rows_per_s": statistics.median(line["rows_per_s"] for line in lines),
        "stall_share": statistics.median(line["stall_share"] for line in lines),
        "mixing": lines[-1]["mixing"],
        "s, from start to end": round(time.perf_counter() - began, 1),
    }
    step_ms = said.get(f"bench topk {d_in} {d_sae}", {}).get("monosem, in a row, ms")
    return found | (
        {"share of the step's speed": found["rows_per_s"] * step_ms / 1000 / setting.rows} if step_ms else {}
    )


# --- the script ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="rewritten after each stage")
    parser.add_argument("--seconds", type=float, default=480, help="about the time it may take")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU in Triton's interpreter")
    parser.add_argument("--only", help="one stage, by its name; small-twin: what compute-sanitizer runs")
    args = parser.parse_args()
    began, setting = time.monotonic(), Setting(rehearsal=args.rehearse)
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print("This script needs a CUDA device, and none is available. --rehearse runs it on a CPU.", file=sys.stderr)
        return 2
    bench_gpu.stand_in_for_small_dependencies()
    if args.only == "small-twin":
        setting.twin_sizes, setting.rows = TWIN_SIZES[:1], 256
        print(twin(setting))
        return 0
    said: dict[str, Any] = {}

    def save(name: str, found: Any) -> None:
        said[name] = found
        args.json.write_text(json.dumps(said, indent=1, default=str) + "\n")
        print(f"{time.monotonic() - began:4.0f} s  {name}: {str(found)[:300]}", flush=True)

    def stage(name: str, work: Callable[[Setting], Any]) -> None:
        if args.only not in (None, name):
            return
        try:
            save(name, work(setting))
        except Exception:
            save(name, {"failed": traceback.format_exc()[-1500:]})

    for name, work in (("machine", about_the_machine), ("tests", tests), ("twin", twin), ("capture", capture)):
        stage(name, work)
    stage("sanitizer", sanitizer)
    if args.only in (None, "bench"):
        bench(setting, began + args.seconds - 120, save)
    stage("sparsify", sparsify)
    stage("profile", profile)
    stage("begin", begin)
    stage("train", lambda setting: train(setting, said))
    return 1 if any("failed" in found for found in said.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
