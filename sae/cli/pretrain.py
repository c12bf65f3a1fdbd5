"""`sae pretrain`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae.cli.flags import Renamed, add_text, add_text_column, add_verb, print_text_read

ACTIVATION_NAMES = {"relu": "relu", "gelu": "gelu", "solu": "solu_ln"}


def pretrain(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "pretrain",
        _run_pretrain,
        "train a small transformer and its tokenizer on text",
        example="sae pretrain --text default --out lm/tiny",
    )
    add_text(verb)
    add_text_column(verb)
    verb.add_argument("--out", required=True, metavar="DIR", help="directory of the model, e.g. lm/tiny")
    verb.add_argument(
        "--from", dest="start", metavar="DIR", help="start from this model of `sae pretrain`, with a new optimizer"
    )
    verb.add_argument("--tokens", type=int, default=60_000_000, metavar="N", help="tokens to train on")
    verb.add_argument("--lr", type=float, default=4e-3, metavar="X", help="highest learning rate of the schedule")
    verb.add_argument(
        "--block-lr-share",
        type=float,
        default=1.0,
        metavar="X",
        help="the blocks learn at this share of --lr; a small one keeps neurons dense, in superposition",
    )
    verb.add_argument("--weight-decay", type=float, default=0.1, metavar="X", help="weight decay of all matrices")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the initial weights and the text order")
    verb.add_argument(
        "--keep-at",
        type=int,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="keep a copy of the model in DIR/kept after so many tokens (0: before the first step)",
    )
    verb.add_argument("--n-layers", type=int, metavar="N", help="number of blocks (1)")
    verb.add_argument("--attn-only", action="store_true", default=None, help="blocks without MLPs")
    verb.add_argument(
        "--act",
        choices=sorted(ACTIVATION_NAMES),
        help="activation function of the MLPs (relu); solu includes the LayerNorm after it",
    )
    verb.add_argument("--d-model", type=int, metavar="N", help="width of the residual stream (128)")
    verb.add_argument("--d-mlp", type=int, metavar="N", help="number of MLP neurons per block (512)")
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another setting of the training or the architecture, such as n_heads=8, n_ctx=128, d_vocab=4096, "
        "batch_contexts=16 or warmup_steps=100; may be repeated",
    )
    verb.add_argument(
        *("--batch-contexts", "--n-heads", "--n-ctx", "--d-vocab"),
        action=Renamed,
        const="--set {name}=VALUE",
        help=argparse.SUPPRESS,
    )


def _run_pretrain(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.lm.pretrain_config import configured, shape_of

    start = None if args.start is None else Path(args.start)
    asked = {
        "d_model": args.d_model,
        "d_mlp": args.d_mlp,
        "n_layers": args.n_layers,
        "act_fn": args.act and ACTIVATION_NAMES[args.act],
        "attn_only": args.attn_only,
    }
    shape, config = configured(
        args.set,
        None if start is None else shape_of(start),
        **{name: value for name, value in asked.items() if value is not None},
        train_tokens=args.tokens,
        lr=args.lr,
        block_lr_share=args.block_lr_share,
        weight_decay=args.weight_decay,
        seed=args.seed,
        keep_at=tuple(sorted(args.keep_at)),
    )
    source = pipeline.source_of(args.text, text_column=args.text_column)
    print(pipeline.pretrain(source, args.out, shape=shape, config=config, start=start))
    print_text_read(source)
    return 0
