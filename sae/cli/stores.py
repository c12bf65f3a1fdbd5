"""Verbs on activation stores."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sae.cli.flags import add_device, add_text, add_verb, resolved_device


def harvest(verbs: Any) -> None:
    verb = add_verb(verbs, "harvest", _run_harvest, "stream a model's activations on text into a Zarr store")
    verb.add_argument("--model", default="tiny-relu-1l", help="directory, shipped name or hub id")
    add_text(verb)
    verb.add_argument("--out", required=True, help="the store, by custom runs/<run>/acts.zarr")
    verb.add_argument("--tokens", type=int, default=2_000_000, help="training tokens (one row each)")
    verb.add_argument("--heldout-tokens", type=int, help="held-out tokens (default: a tenth, 65,536 to 262,144)")
    verb.add_argument("--hook-point", action="append", help="may repeat (default: blocks.0.mlp.hook_post)")
    verb.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"], help="on disk")
    verb.add_argument("--seq-len", type=int, help="context length in tokens (default: 256, or the model's if shorter)")
    add_device(verb)


def _run_harvest(args: argparse.Namespace) -> int:
    from sae import harvesting, pipeline
    from sae.lm import load_model
    from sae.text import combine, open_text

    model = load_model(args.model, device=resolved_device(args.device))
    source = combine([open_text(spec) for spec in args.text])
    hook_points = args.hook_point or [pipeline.DEFAULT_HOOK_POINT]
    heldout = args.heldout_tokens or harvesting.default_heldout_tokens(args.tokens)
    plan = harvesting.plan(args.tokens, heldout, args.seq_len or min(256, model.context_tokens))
    widths = [model.hook_width(hook_point) for hook_point in hook_points]
    print(f"forecast: {pipeline.forecast_harvest(plan, widths, args.dtype, Path(args.out))}", file=sys.stderr)
    pipeline.harvest(
        model, source, args.out, tokens=args.tokens, hook_points=hook_points, dtype=args.dtype,
        heldout_tokens=heldout, seq_len=args.seq_len,
    )  # fmt: skip
    if source.report.documents:
        print(f"text read: {source.report.summary()}", file=sys.stderr)
        for problem in source.report.first_problems:
            print(f"  {problem}", file=sys.stderr)
    print(args.out)
    return 0


def verify(verbs: Any) -> None:
    verb = add_verb(verbs, "verify", _run_verify, "check every checksum of an activation store")
    verb.add_argument("path")


def _run_verify(args: argparse.Namespace) -> int:
    from sae import pipeline

    problems = pipeline.verify(args.path)
    for problem in problems:
        print(problem)
    print(f"{args.path}: {len(problems)} found wrong" if problems else f"{args.path}: every checksum holds")
    return 1 if problems else 0
