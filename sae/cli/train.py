"""`sae train`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import _refuse_many_processes, add_kernels, add_text, add_verb, size


def train(verbs: Any) -> None:
    verb = add_verb(
        verbs, "train", _run_train, "learn a dictionary from an activation store, or from a model while it runs"
    )
    verb.add_argument("--acts", help="the activation store")
    verb.add_argument("--live", metavar="MODEL", help="instead: run this model on --text meanwhile, nothing on disk")
    add_text(verb, required=False)
    verb.add_argument("--out", required=True, help="directory of the dictionary, by custom runs/<run>/<name>")
    verb.add_argument(
        "--recipe", default="balanced", help="such as balanced, topk, jumprelu, towards-monosemanticity; see the README"
    )
    verb.add_argument("--d-sae", type=int, default=4096, help="number of features")
    verb.add_argument("--l0", type=float, help="active features per token wanted: sets k, or finds λ while training")
    verb.add_argument("--tokens", type=int, help="rows seen (default: four epochs of the store; 4M live)")
    verb.add_argument("--batch-tokens", type=int, help="rows per step")
    verb.add_argument("--seed", type=int, default=0, help="of initialisation and row order")
    verb.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="any other setting, e.g. lr=5e-4, l1=3 or exact=true; repeats",
    )
    verb.add_argument(
        "--hook-point",
        action="append",
        help="x's, then y's for a transcoder (default: the store's only one, or an MLP's)",
    )
    verb.add_argument("--keep", type=int, default=1, help="saved states to keep, the last one included")
    verb.add_argument(
        "--log-to", action="append", choices=["tensorboard", "wandb"], help="beside metrics.jsonl; may repeat"
    )
    verb.add_argument(
        "--max-ram",
        type=size,
        default="1GB",
        metavar="SIZE",
        help="of rows held: a larger store is shuffled in two levels",
    )
    add_kernels(verb)


def _run_train(args: argparse.Namespace) -> int:
    _refuse_many_processes("train")
    from sae import pipeline
    from sae.training.config import parsed

    settings = {"batch_tokens": args.batch_tokens, "target_l0": args.l0}
    given = {name: value for name, value in settings.items() if value is not None}
    hook_point, target_hook_point = (*(args.hook_point or []), None, None)[:2]
    if bool(args.acts) == bool(args.live) or bool(args.live) != bool(args.text):
        raise ValueError("say where the rows come from: --acts STORE, or --live MODEL with --text SOURCE.")
    pipeline.train(
        pipeline.Live(args.live, args.text) if args.live else args.acts,
        args.out,
        recipe=args.recipe,
        d_sae=args.d_sae,
        tokens=args.tokens,
        seed=args.seed,
        config=given | parsed(args.set or []),
        hook_point=hook_point,
        target_hook_point=target_hook_point,
        kernels=args.kernels,
        device=args.device,
        keep=args.keep,
        log_to=args.log_to or [],
        max_ram_bytes=args.max_ram,
    )
    print(args.out)
    return 0
