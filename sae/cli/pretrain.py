"""`sae pretrain`."""

from __future__ import annotations

import argparse
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
    verb.add_argument("--n-layers", type=int, default=1, metavar="N", help="number of blocks")
    verb.add_argument("--attn-only", action="store_true", help="blocks without MLPs")
    verb.add_argument(
        "--act",
        choices=sorted(ACTIVATION_NAMES),
        default="relu",
        help="activation function of the MLPs; solu includes the LayerNorm after it",
    )
    verb.add_argument("--d-model", type=int, default=128, metavar="N", help="width of the residual stream")
    verb.add_argument("--d-mlp", type=int, default=512, metavar="N", help="number of MLP neurons per block")
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
    from sae.lm.pretrain import configured

    shape, config = configured(
        args.set,
        d_model=args.d_model,
        d_mlp=args.d_mlp,
        n_layers=args.n_layers,
        act_fn=ACTIVATION_NAMES[args.act],
        attn_only=args.attn_only,
        train_tokens=args.tokens,
        lr=args.lr,
        block_lr_share=args.block_lr_share,
        weight_decay=args.weight_decay,
        seed=args.seed,
        keep_at=tuple(sorted(args.keep_at)),
    )
    source = pipeline.source_of(args.text, text_column=args.text_column)
    print(pipeline.pretrain(source, args.out, shape=shape, config=config))
    print_text_read(source)
    return 0
