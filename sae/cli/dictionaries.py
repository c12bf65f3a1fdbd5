"""Verbs that make, measure and hand on dictionaries."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sae.cli.flags import add_dictionary, add_kernels, add_verb


def train(verbs: Any) -> None:
    verb = add_verb(verbs, "train", _run_train, "learn a dictionary from an activation store")
    verb.add_argument("--acts", required=True, help="the activation store")
    verb.add_argument("--out", required=True, help="directory of the dictionary, by custom runs/<run>/<name>")
    verb.add_argument("--recipe", default="topk", help="towards-monosemanticity or topk")
    verb.add_argument("--d-sae", type=int, default=4096, help="number of features")
    verb.add_argument("--tokens", type=int, help="rows seen (default: four epochs of the store)")
    verb.add_argument("--batch-tokens", type=int, help="rows per step")
    verb.add_argument("--lr", type=float, help="peak learning rate")
    verb.add_argument("--l1", type=float, help="λ on inputs scaled to E‖x‖² = d_in (config.json has other conventions)")
    verb.add_argument("--k", type=int, help="active features per token (topk)")
    verb.add_argument(
        "--dead-tokens",
        type=int,
        help="silent for this many rows = dead (default: an eightieth of the run, 100,000 to 10M)",
    )
    verb.add_argument("--seed", type=int, default=0, help="of initialisation and row order")
    verb.add_argument(
        "--exact", action="store_true", default=None, help="the paper's resampling counts instead of shares of the run"
    )
    verb.add_argument("--hook-point", help="needed when the store holds several")
    add_kernels(verb)
    verb.add_argument(
        "--matmul",
        choices=["auto", "highest", "medium", "bf16"],
        help="dense products: auto is the fastest with float32's error; bf16 rounds their factors to bfloat16",
    )


def _run_train(args: argparse.Namespace) -> int:
    from sae import pipeline

    settings = {
        name: getattr(args, name) for name in ("batch_tokens", "lr", "l1", "k", "dead_tokens", "exact", "matmul")
    }
    pipeline.train(
        args.acts, args.out, recipe=args.recipe, d_sae=args.d_sae, tokens=args.tokens, seed=args.seed,
        config={name: value for name, value in settings.items() if value is not None}, hook_point=args.hook_point,
        kernels=args.kernels, device=args.device,
    )  # fmt: skip
    print(args.out)
    return 0


def evaluate(verbs: Any) -> None:
    verb = add_verb(verbs, "eval", _run_eval, "measure a dictionary on the frozen held-out split")
    add_dictionary(verb)
    add_kernels(verb)
    verb.add_argument("--json", action="store_true", help="print eval.json")


def _run_eval(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.report import eval_table

    result = pipeline.evaluate(args.sae, store=args.acts, model=args.model, device=args.device, kernels=args.kernels)
    print(json.dumps(result, indent=2) if args.json else eval_table(result))
    return 0


def index(verbs: Any) -> None:
    verb = add_verb(verbs, "index", _run_index, "build the feature index that the browser reads")
    add_dictionary(verb)
    add_kernels(verb)
    verb.add_argument("--tokens", type=int, default=1_000_000, help="tokens to index, held-out ones first")


def _run_index(args: argparse.Namespace) -> int:
    from sae import pipeline

    path = pipeline.index(
        args.sae, store=args.acts, model=args.model, tokens=args.tokens, device=args.device, kernels=args.kernels
    )
    print(path)
    return 0


def export(verbs: Any) -> None:
    verb = add_verb(verbs, "export", _run_export, "write a dictionary as safetensors for other tools")
    verb.add_argument("sae", help="directory of the dictionary")
    verb.add_argument("--format", default="native", choices=["native", "sae-lens"], help="layout")
    verb.add_argument("--out", required=True, help="directory to write")


def _run_export(args: argparse.Namespace) -> int:
    from sae import pipeline

    print(pipeline.export(args.sae, args.format, args.out))
    return 0
