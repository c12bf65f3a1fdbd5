"""`sae harvest`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sae.cli.flags import (
    MODEL,
    Either,
    add_device,
    add_special_tokens,
    add_text_column,
    add_verb,
    print_text_read,
    size,
)

TOKENS = 2_000_000
KINDS = ("token-ids", "tokenizer", "texts", "images", "labels", "keep")  # beside the rows of --from


def harvest(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "harvest",
        _run_harvest,
        "run a model on text and write its activations into a store, or take activations from files",
        example="sae harvest --model tiny-relu-1l --text default --out runs/a/acts.zarr",
    )
    verb.add_argument(
        "--model", help=f"{MODEL} (default: tiny-relu-1l); with --from: a name to record, the model is not opened"
    )
    verb.add_argument(
        "--text",
        "--from",
        action=Either,
        const={"--text": "text", "--from": "arrays"},
        repeated=True,
        metavar="SOURCE",
        help="--text: a file, a directory, a dataset, or 'default' for the text on this machine; may be repeated. "
        "--from [KIND=]PATH: instead of a model and a text, a file or directory of activations (.npy, .safetensors, "
        "Zarr, .arrow, .parquet); repeated with KIND= for what lies beside them, for each row or sample: "
        f"{', '.join(KINDS)}",
    )
    verb.set_defaults(arrays=None)
    add_text_column(verb)
    add_special_tokens(verb)
    verb.add_argument(
        "--out", required=True, metavar="STORE", help="the store, e.g. runs/a/acts.zarr or s3://bucket/path"
    )
    verb.add_argument(
        "--tokens", type=int, metavar="N", help=f"training tokens, one row for each (default: {TOKENS:,})"
    )
    verb.add_argument(
        "--heldout-tokens",
        type=int,
        metavar="N",
        help="held-out tokens (default: a tenth of --tokens, at least 65,536 and at most 262,144)",
    )
    verb.add_argument(
        "--hook-point",
        action="append",
        metavar="NAME",
        help="where in the model to read; may be repeated (default: blocks.0.mlp.hook_post)",
    )
    verb.add_argument(
        "--dtype",
        action="append",
        metavar="[NAME=]DTYPE",
        help="number format on disk: float16, bfloat16 or float32; NAME=DTYPE sets it for one hook point (default: "
        "float16; with --from that of the arrays)",
    )
    verb.add_argument(
        "--seq-len",
        "--rows-per-sample",
        type=int,
        metavar="N",
        help="tokens of a context (default: 256, or the model's limit if lower); with --from: so many rows in turn "
        "belong together, such as the patches of an image (default: as a 3-d array says, else unknown)",
    )
    verb.add_argument(
        "--context-bos",
        action=argparse.BooleanOptionalAction,
        help="begin every context with the model's BOS token (default: yes, but no for models of sae pretrain; a store "
        "that exists keeps its rule)",
    )
    verb.add_argument(
        "--world",
        "--workers",
        type=int,
        metavar="N",
        help="number of worker processes, which share the 64 lanes of the text (default: WORLD_SIZE, else 1)",
    )
    verb.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="run as this one of the workers, counted from 0 (default: RANK; without it all are started here)",
    )
    verb.add_argument(
        "--max-disk", type=size, metavar="SIZE", help="stop before the store grows larger, e.g. 20GB; it stays usable"
    )
    verb.add_argument(
        "--max-ram",
        type=size,
        metavar="SIZE",
        help="stop when all workers together hold more memory, e.g. 8GB; the store stays usable",
    )
    verb.add_argument(
        "--keep-rows", type=int, metavar="N", help="keep only the newest training rows, at most this many"
    )
    verb.add_argument("--take-over", action="store_true", help="of a remote store: take lanes over from dead workers")
    add_device(verb, mps=True)


def _run_harvest(args: argparse.Namespace) -> int:
    if bool(args.arrays) == bool(args.text):
        raise ValueError("name what to store: either --model NAME and --text SOURCE, or --from PATH (activations).")
    if args.arrays:
        return _store_arrays(args)
    rank = _number(args.rank, "RANK")
    if rank is None and (args.world or 1) > 1:
        return _run_workers(args)
    from sae import pipeline

    hook_points = args.hook_point or [pipeline.DEFAULT_HOOK_POINT]
    dtypes = _dtypes(args.dtype, hook_points)
    source = pipeline.source_of(args.text, text_column=args.text_column, special_tokens=args.special_tokens)
    out = pipeline.harvest(
        args.model or "tiny-relu-1l",
        source,
        args.out,
        tokens=TOKENS if args.tokens is None else args.tokens,
        hook_points=hook_points,
        dtype=dtypes,
        heldout_tokens=args.heldout_tokens,
        seq_len=args.seq_len,
        context_bos=args.context_bos,
        device=args.device,
        max_disk_bytes=args.max_disk,
        max_ram_bytes=args.max_ram,
        keep_rows=args.keep_rows,
        rank=rank or 0,
        world=_number(args.world, "WORLD_SIZE") or 1,
        take_over=args.take_over,
        report=lambda line: print(line, file=sys.stderr),
    )
    print_text_read(source)
    if args.max_disk is not None:
        _report_disk_budget(out)
    print(out)
    return 0


def _store_arrays(args: argparse.Namespace) -> int:
    """Stores activations that come as arrays. Raises: ValueError for flags that are about running a model."""
    running = (
        "tokens",
        "heldout_tokens",
        "world",
        "rank",
        "max_disk",
        "max_ram",
        "keep_rows",
        "text_column",
        "special_tokens",
        "context_bos",
    )
    for flag in running:
        if getattr(args, flag) not in (None, False):
            raise ValueError(f"--{flag.replace('_', '-')} does not go with --from: all rows of the arrays are stored.")
    from sae import pipeline

    beside: dict[str, Any] = {}
    paths = []
    for item in args.arrays:
        kind, equals, path = item.partition("=")
        if not equals or kind not in KINDS:
            paths.append(item)
        elif kind in beside:
            raise ValueError(f"--from {kind}= is given twice.")
        else:
            beside[kind] = path
    if len(paths) != 1:
        given = ", ".join(paths) or "none"
        raise ValueError(
            f"--from takes one path of activations (a directory may hold several files), got {given}. What lies beside "
            f"them needs its kind: {', '.join(f'{kind}=PATH' for kind in KINDS)}."
        )
    hook_points = args.hook_point or []
    out = pipeline.store_activations(
        paths[0],
        args.out,
        hook_points=hook_points,
        rows_per_sample=args.seq_len,
        dtype=_array_dtypes(args.dtype or []),
        **{kind.replace("-", "_"): path for kind, path in beside.items()},
        **({"model": args.model} if args.model else {}),
        report=lambda line: print(line, file=sys.stderr),
    )
    print(out)
    return 0


def _array_dtypes(given: list[str]) -> str | dict[str, str] | None:
    """One dtype for all arrays, or those that are named."""
    named = dict(item.split("=", 1) for item in given if "=" in item)
    plain = [item for item in given if "=" not in item]
    if named and plain:
        raise ValueError("--dtype with --from: give one dtype for all arrays, or NAME=DTYPE for each.")
    return named or (plain[-1] if plain else None)


def _number(given: int | None, variable: str) -> int | None:
    """A flag's value, else that of the environment variable, which torchrun sets."""
    found = os.environ.get(variable)
    return given if given is not None or not found else int(found)


def _dtypes(given: list[str] | None, hook_points: list[str]) -> dict[str, str]:
    """The dtype of each hook point: those without a name first. Raises: ValueError for an unknown hook point."""
    found = dict.fromkeys(hook_points, "float16")
    for item in sorted(given or [], key=lambda item: "=" in item):
        hook, _, dtype = item.rpartition("=")
        if hook and hook not in found:
            raise ValueError(f"--dtype {item}: {hook} is not harvested; name it with --hook-point too.")
        found |= {hook: dtype} if hook else dict.fromkeys(hook_points, dtype)
    return found


def _report_disk_budget(out: str | Path) -> None:
    """Prints how much of the plan fits into --max-disk, if not all of it."""
    from sae import pipeline

    found = pipeline.describe(out)
    if not found["complete"]:
        train = found["splits"]["train"]
        print(
            f"stopped at the disk budget: {train['shards_written']:,} of {train['shards']:,} training shards are "
            "written and can be used as they are. Raise --max-disk and repeat the command to continue.",
            file=sys.stderr,
        )


def _run_workers(args: argparse.Namespace) -> int:
    """Runs this command once for each worker, with its rank; Ctrl-C and SIGTERM reach all of them."""
    from sae.harvesting.lanes import lanes_of
    from sae.jobs.progress import Interrupted, interruptible

    lanes_of(0, args.world)  # refuses a wrong number before any worker starts
    threads = max(1, (os.cpu_count() or 1) // args.world)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ  # what the user set wins
    share = ["--max-ram", str(args.max_ram // args.world)] if args.max_ram else []
    command = [sys.executable, "-m", "sae.cli", *args.arguments, *share, "--rank"]
    with interruptible() as interrupt:
        workers = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(args.world)]
        stopped = False
        for worker in workers:
            while worker.poll() is None:
                if interrupt.requested and not stopped:
                    stopped = True
                    for other in workers:
                        other.terminate()
                try:
                    worker.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
    if stopped:
        raise Interrupted(f"stopped with every finished shard saved in {args.out}. Repeat the command to continue.")
    failed = {rank: worker.returncode for rank, worker in enumerate(workers) if worker.returncode}
    for rank, status in failed.items():
        print(
            f"sae harvest: worker {rank} failed with exit status {status}; its finished shards are saved.",
            file=sys.stderr,
        )
    if failed:
        print("Repeat the command to write the missing shards.", file=sys.stderr)
    return max((abs(status) for status in failed.values()), default=0)
