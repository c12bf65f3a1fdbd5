"""`sae train`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import (
    Either,
    add_kernels,
    add_settings,
    add_special_tokens,
    add_text,
    add_text_column,
    add_verb,
    print_text_read,
    settings,
    size,
)
from sae.jobs.ranks import is_first_rank


def train(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "train",
        _run_train,
        "train a dictionary on an activation store, or on a model while it runs",
        example="sae train --acts runs/a/acts.zarr --l0 20 --out runs/a/first",
    )
    verb.add_argument(
        "--acts",
        "--live",
        action=Either,
        const={"--acts": "acts", "--live": "live"},
        repeated=True,
        metavar="SOURCE",
        help="--acts STORE: the activation store to train on, several of one text for a crosscoder; --live MODEL: run "
        "this model on --text while training, nothing on disk",
    )
    verb.set_defaults(live=None)
    verb.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        help="start from this dictionary (ours or an imported one): with its function, and a new optimizer",
    )
    add_text(verb, required=False, help="text for --live: a file, a directory, a dataset or 'default'; may be repeated")
    add_text_column(verb)
    add_special_tokens(verb)
    verb.add_argument("--out", required=True, metavar="DIR", help="directory of the dictionary, e.g. runs/a/first")
    verb.add_argument(
        "--recipe",
        metavar="NAME",
        help="training recipe: matryoshka, balanced, topk, towards-monosemanticity …; an unknown name lists all "
        "(default: that of the run in --out; for a new one matryoshka)",
    )
    verb.add_argument(
        "--d-sae", type=int, metavar="N", help="number of features (default: that of the --from dictionary, else 4096)"
    )
    verb.add_argument(
        "--l0",
        type=float,
        metavar="N",
        help="mean number of active features per token to aim for (default: the recipe's sparsity)",
    )
    verb.add_argument(
        "--tokens", type=int, metavar="N", help="rows to train on (default: four epochs of a store; 4,000,000 live)"
    )
    add_settings(verb)
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the initial weights and the row order")
    verb.add_argument(
        "--hook-point",
        action="append",
        metavar="NAME",
        help="where in the model to read; given twice for a transcoder: its input, then its output; once for each "
        "site of a crosscoder (default: the store's only one; live: blocks.0.mlp.hook_post)",
    )
    verb.add_argument("--keep", type=int, default=1, metavar="N", help="number of saved states to keep on disk")
    verb.add_argument(
        "--log-to",
        action="append",
        choices=["tensorboard", "wandb"],
        help="log there too, besides metrics.jsonl; may be repeated",
    )
    verb.add_argument(
        "--max-ram",
        type=size,
        metavar="SIZE",
        help="memory for rows, e.g. 4GB: a larger store is shuffled in two levels (default: 1GB)",
    )
    verb.add_argument(
        "--shard",
        metavar="HOW",
        help="under torchrun, how the processes train one dictionary together: features (each holds a part of it), "
        "rows (each holds all of it), RxF (R groups of F parts) or auto",
    )
    verb.add_argument(
        "--precision",
        choices=["float32", "bf16"],
        help="how features are selected: float32 (default), or bf16: straight from a bfloat16 product, as peers do",
    )
    add_kernels(verb)


def _run_train(args: argparse.Namespace) -> int:
    from sae import pipeline

    if bool(args.acts) == bool(args.live) or bool(args.live) != bool(args.text):
        raise ValueError("name what to train on: either --acts STORE, or --live MODEL with --text SOURCE.")
    hook_points = args.hook_point or []
    sites = bool(args.acts) and (args.recipe == "crosscoder" or len(args.acts) > 1)
    if not sites and len(args.acts or args.live) + len(hook_points[2:]) > 1:
        raise ValueError(
            "several stores, or more than two hook points, are the sites of a crosscoder (--acts and "
            f"--recipe crosscoder); got {len(args.acts or args.live)} and {len(hook_points)} with "
            f"{args.recipe or 'no --recipe'}."
        )
    hook_point, target_hook_point = (None, None) if sites else (*hook_points, None, None)[:2]
    memory = {} if args.max_ram is None else {"max_ram_bytes": args.max_ram}
    if not args.live and (args.text_column or args.special_tokens):
        raise ValueError("--text-column and --special-tokens go with --live: a store's text has been read already.")
    text: dict[str, Any] = {"text_column": args.text_column, "special_tokens": args.special_tokens}
    source = pipeline.source_of(args.text, **text) if args.live else None
    stored = pipeline.Sites(args.acts, hook_points) if sites else (args.acts or [None])[0]
    pipeline.train(
        pipeline.Live(args.live[0], source, **memory) if source else stored,
        args.out,
        recipe=args.recipe,
        d_sae=args.d_sae,
        l0=args.l0,
        tokens=args.tokens,
        seed=args.seed,
        config=settings(args) | ({} if args.precision is None else {"precision": args.precision}),
        hook_point=hook_point,
        target_hook_point=target_hook_point,
        kernels=args.kernels,
        device=args.device,
        keep=args.keep,
        log_to=args.log_to or [],
        start_from=args.source,
        shard=args.shard,
        **memory,
    )
    if not is_first_rank():
        return 0
    if source:
        print_text_read(source)
    print(args.out)
    return 0
