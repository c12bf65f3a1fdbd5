"""`sae harvest`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from sae.cli.flags import add_device, add_text, add_verb, resolved_device, size

DTYPES = ("float16", "bfloat16", "float32")


def harvest(verbs: Any) -> None:
    verb = add_verb(verbs, "harvest", _run_harvest, "stream a model's activations on text into a Zarr store")
    verb.add_argument("--model", default="tiny-relu-1l", help="directory, shipped name or hub id")
    add_text(verb)
    verb.add_argument("--out", required=True, help="the store, by custom runs/<run>/acts.zarr, or s3://bucket/path")
    verb.add_argument("--tokens", type=int, default=2_000_000, help="training tokens (one row each)")
    verb.add_argument("--heldout-tokens", type=int, help="held-out tokens (default: a tenth, 65,536 to 262,144)")
    verb.add_argument("--hook-point", action="append", help="may repeat (default: blocks.0.mlp.hook_post)")
    verb.add_argument(
        "--dtype", action="append", metavar="DTYPE", help="on disk: float16 (default), bfloat16, float32; or HOOK=DTYPE"
    )
    verb.add_argument("--seq-len", type=int, help="context length in tokens (default: 256, or the model's if shorter)")
    verb.add_argument(
        "--world", "--workers", type=int, metavar="N", help="workers sharing the 64 lanes (default: WORLD_SIZE, else 1)"
    )
    verb.add_argument("--rank", type=int, help="be this one of them, from 0 (default: RANK; else start them all here)")
    verb.add_argument("--max-disk", type=size, metavar="SIZE", help="stop, ready for use, before the store takes more")
    verb.add_argument(
        "--max-ram", type=size, metavar="SIZE", help="stop, ready for use, when the workers hold more memory"
    )
    verb.add_argument("--keep-rows", type=int, help="a ring: keep only the newest training rows, at most so many")
    verb.add_argument("--take-over", action="store_true", help="of a remote store: take lanes from workers that died")
    add_device(verb)


def _run_harvest(args: argparse.Namespace) -> int:
    rank = _number(args.rank, "RANK")
    if rank is None and (args.world or 1) > 1:
        return _run_workers(args)
    from sae import pipeline
    from sae.harvesting import lanes
    from sae.lm import load_model

    model = load_model(args.model, device=resolved_device(args.device))
    source = pipeline.source_of(args.text)
    hook_points = args.hook_point or [pipeline.DEFAULT_HOOK_POINT]
    dtypes = _dtypes(args.dtype, hook_points)
    heldout = args.heldout_tokens or lanes.default_heldout_tokens(args.tokens)
    plan = lanes.plan(args.tokens, heldout, args.seq_len or min(256, model.context_tokens), args.keep_rows)
    widths = {hook_point: model.hook_width(hook_point) for hook_point in hook_points}
    print(f"forecast: {pipeline.forecast_harvest(plan, widths, dtypes, args.out)}", file=sys.stderr)
    out = pipeline.harvest(
        model,
        source,
        args.out,
        tokens=args.tokens,
        hook_points=hook_points,
        dtype=dtypes,
        heldout_tokens=heldout,
        seq_len=args.seq_len,
        max_disk_bytes=args.max_disk,
        max_ram_bytes=args.max_ram,
        keep_rows=args.keep_rows,
        rank=rank or 0,
        world=_number(args.world, "WORLD_SIZE") or 1,
        take_over=args.take_over,
    )
    if source.report.documents:
        print(f"text read: {source.report.summary()}", file=sys.stderr)
        for problem in source.report.first_problems:
            print(f"  {problem}", file=sys.stderr)
    if args.max_disk is not None:
        _say_what_is_there(out)
    print(out)
    return 0


def _number(given: int | None, variable: str) -> int | None:
    """A flag, or what torchrun says in the environment."""
    found = os.environ.get(variable)
    return given if given is not None or not found else int(found)


def _dtypes(given: list[str] | None, hook_points: list[str]) -> dict[str, str]:
    """One dtype for all, then those given as HOOK=DTYPE. Raises: ValueError for a hook point that is not harvested."""
    found = dict.fromkeys(hook_points, "float16")
    for item in sorted(given or [], key=lambda item: "=" in item):
        hook, _, dtype = item.rpartition("=")
        if hook and hook not in found:
            raise ValueError(f"--dtype {item}: {hook} is not harvested; name it with --hook-point.")
        found |= {hook: dtype} if hook else dict.fromkeys(hook_points, dtype)
    return found


def _say_what_is_there(out: Any) -> None:
    from sae import pipeline

    found = pipeline.describe(out)
    if not found["complete"]:
        train = found["splits"]["train"]
        print(
            f"stopped at the disk budget: {train['shards_written']:,} of {train['shards']:,} training shards are there "
            "and can be used as they are. Raise --max-disk and repeat the command to go on.",
            file=sys.stderr,
        )


def _run_workers(args: argparse.Namespace) -> int:
    """This command once for each worker, with its rank; Ctrl-C and SIGTERM reach all of them."""
    from sae.harvesting.lanes import lanes_of
    from sae.jobs.progress import Interrupted, interruptible

    lanes_of(0, args.world)
    threads = max(1, (os.cpu_count() or 1) // args.world)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ  # what the user set wins
    share = ["--max-ram", str(args.max_ram // args.world)] if args.max_ram else []
    command = [sys.executable, "-m", "sae.cli", *args.arguments, *share, "--rank"]
    with interruptible() as interrupt:
        workers = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(args.world)]
        told = False
        for worker in workers:
            while worker.poll() is None:
                if interrupt.requested and not told:
                    told = True
                    for other in workers:
                        other.terminate()
                try:
                    worker.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
    if told:
        raise Interrupted(f"stopped with every finished shard saved in {args.out}. Repeat the command to go on.")
    failed = {rank: worker.returncode for rank, worker in enumerate(workers) if worker.returncode}
    for rank, status in failed.items():
        print(f"sae harvest: worker {rank} ended with status {status}; the others' shards are saved.", file=sys.stderr)
    if failed:
        print("Repeat the command: it takes up what is missing.", file=sys.stderr)
    return max((abs(status) for status in failed.values()), default=0)
