"""Measures the data path in one run: the harvest, a trainer's waiting for rows, the index.

    python scripts/bench_data.py                                                       # small, to see that it runs
    python scripts/bench_data.py --text FILE --tokens 3100000 --peers DIR --json data.json

- `harvest`: compared with the bare forward pass to the hook on the same contexts (goal: 0.85 of its speed) and, with
  `--peers` (the directory of the peers' environments), with SAELens' own caching of them (goal: twice its speed);
- `trainer`: how long steps wait for rows, from that store and from the running model;
- `index`: seconds per feature, including the forward pass over its tokens.
Processor seconds (of all threads) are shown next to the wall clock: on a busy machine their ratios vary less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from safetensors.numpy import save_file

from sae import pipeline
from sae.harvesting import harvest as harvesting
from sae.lm import LanguageModel, load_model, shipped_models
from sae.text.sources import TextSource
from store.activations import ActivationStore

SEQ_LEN = 256
HOOK = "blocks.0.mlp.hook_post"
BATCH_ROWS, D_SAE = 4096, 4096
MODEL = "tiny-relu-1l"
SAEDASHBOARD_S_PER_FEATURE = 0.5  # over 3.1M tokens, on a machine like the one described in the JSON


class Clock:
    """Wall and processor seconds by name, as often as each was measured."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.cpu_s: dict[str, list[float]] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        began, used = time.perf_counter(), time.process_time()
        yield
        self.note(name, time.perf_counter() - began, time.process_time() - used)

    def note(self, name: str, seconds: float, cpu_s: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.cpu_s.setdefault(name, []).append(cpu_s)

    def median(self, name: str) -> tuple[float, float]:
        return statistics.median(self.seconds[name]), statistics.median(self.cpu_s[name])


def harvest(
    model: LanguageModel, source: TextSource, tokens: int, rounds: int, peers: Path | None, scratch: Path
) -> Clock:
    """Times whole harvests, the bare forward pass over the same contexts, and SAELens' caching of them, in turn."""
    clock = Clock()
    model.capture(torch.zeros((2, SEQ_LEN), dtype=torch.long), HOOK)
    for number in range(rounds):
        shutil.rmtree(scratch / "acts.zarr", ignore_errors=True)
        with clock.of("harvest"):
            pipeline.harvest(model, source, scratch / "acts.zarr", tokens=tokens)
        store = ActivationStore.open(scratch / "acts.zarr")
        contexts = [
            store.read_contexts(split, s).tokens for split in ("heldout", "train") for s in store.markers(split)
        ]
        with clock.of("forward to the hook"):
            for part in contexts:
                harvesting._activations(model, {HOOK: store.hook_points[HOOK]}, part)
        if peers:
            found = _saelens(peers, np.concatenate(contexts), scratch / f"saelens-{number}")
            clock.note("SAELens' caching", found["seconds"], found["cpu_s"])
    return clock


def _saelens(peers: Path, contexts: np.ndarray, scratch: Path) -> dict[str, float]:
    scratch.mkdir()
    save_file({"tokens": contexts.astype(np.int32)}, scratch / "contexts.safetensors")
    worker = Path(__file__).parent / "peers" / "cache_saelens.py"
    python = next(p for p in (peers / "pv_saelens", peers / "envs" / "pv_saelens") if p.is_dir()) / "bin" / "python"
    done = subprocess.run(
        [python, worker, shipped_models()[MODEL], scratch / "contexts.safetensors", HOOK, scratch / "cached"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
    )
    shutil.rmtree(scratch)
    if done.returncode:
        raise RuntimeError(f"SAELens' side failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def trainer(model: LanguageModel, source: TextSource, steps: int, scratch: Path) -> list[dict[str, Any]]:
    """Speed and waiting of steps on rows from the store and from the running model, without the first logged line."""
    found = []
    for name, rows in (("store", scratch / "acts.zarr"), ("live", pipeline.Live(model, source))):
        out = scratch / f"from-{name}"
        pipeline.train(rows, out, recipe="topk", d_sae=D_SAE, tokens=steps * BATCH_ROWS, config={"k": 32})
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steady = lines[1:] or lines
        found.append(
            {
                "rows_from": name,
                "rows_per_s": statistics.median(line["rows_per_s"] for line in steady),
                "stall_share": statistics.median(line["stall_share"] for line in steady),
            }
        )
    return found


def index(tokens: int, forward: tuple[float, float], scratch: Path) -> dict[str, Any]:
    """Times the index of the trained dictionary over all tokens; also with the forward pass that made its rows."""
    clock = Clock()
    with clock.of("index"):
        pipeline.index(scratch / "from-store", tokens=10**12)
    seconds, cpu_s = (ours + theirs for ours, theirs in zip(clock.median("index"), forward, strict=True))
    return {
        "tokens": tokens,
        "features": D_SAE,
        "index_s": clock.median("index")[0],
        "with_forward_s": seconds,
        "with_forward_cpu_s": cpu_s,
        "s_per_feature": seconds / D_SAE,
        "saedashboard_over_ours": SAEDASHBOARD_S_PER_FEATURE / (seconds / D_SAE),
    }


def data_path(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    model, source = load_model(MODEL), pipeline.source_of(args.text)
    clock = harvest(model, source, args.tokens, args.rounds, args.peers and args.peers.resolve(), scratch)
    tokens = sum(split["rows"] for split in pipeline.describe(scratch / "acts.zarr")["splits"].values())
    result: dict[str, Any] = {"tokens": tokens, "seconds": clock.seconds, "cpu_s": clock.cpu_s}
    print(
        f"\nharvest of {tokens:,} rows of {MODEL}\n| what | s | rows/s | CPU s | speed of the harvest relative to it |"
    )
    print("|---|--:|--:|--:|--:|")
    ours = clock.median("harvest")
    for name in clock.seconds:
        seconds, cpu_s = clock.median(name)
        print(
            f"| {name} | {seconds:.1f} | {tokens / seconds:,.0f} | {cpu_s:.1f} | {seconds / ours[0]:.2f} |", flush=True
        )
    result["trainer"] = trainer(model, source, args.steps, scratch)
    print("\n| rows from | rows/s of the trainer | share of the time it waits |\n|---|--:|--:|")
    for entry in result["trainer"]:
        print(f"| {entry['rows_from']} | {entry['rows_per_s']:,.0f} | {entry['stall_share']:.2%} |", flush=True)
    result["index"] = index(tokens, clock.median("forward to the hook"), scratch)
    print(
        "\nindex: {tokens:,} tokens, {features:,} features: {index_s:.1f} s, with the forward pass {with_forward_s:.1f}"
        " s, {s_per_feature:.4f} s a feature (SAEDashboard, without that pass, takes {saedashboard_over_ours:.0f} "
        "times as long)".format(**result["index"])
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", help="text to harvest (default: the default text)")
    parser.add_argument("--tokens", type=int, default=131_072, help="training tokens harvested, indexed and trained on")
    parser.add_argument(
        "--rounds", type=int, default=1, help="harvests, each followed by its forward pass and the peer"
    )
    parser.add_argument("--steps", type=int, default=50, help="steps of each training")
    parser.add_argument("--peers", type=Path, help="directory of the peers' environments")
    parser.add_argument("--scratch", type=Path, help="directory for temporary files")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    args.text = args.text or ["default"]
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    hardware = machine.hardware()
    print(json.dumps(hardware))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        result = data_path(args, Path(scratch))
    if args.json:
        args.json.write_text(json.dumps({"hardware": hardware, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
