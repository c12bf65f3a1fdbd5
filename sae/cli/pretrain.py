"""`sae pretrain`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae.cli.flags import add_text, add_verb


def pretrain(verbs: Any) -> None:
    verb = add_verb(verbs, "pretrain", _run_pretrain, "train a one-layer transformer (tokenizer first) on text")
    add_text(verb)
    verb.add_argument("--out", required=True, help="directory of the model")
    verb.add_argument("--tokens", type=int, default=60_000_000, help="tokens seen in training")
    verb.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    verb.add_argument("--batch-contexts", type=int, default=32, help="contexts per step")
    verb.add_argument("--seed", type=int, default=0, help="of initialisation and data order")
    verb.add_argument("--d-model", type=int, default=128, help="residual width")
    verb.add_argument("--d-mlp", type=int, default=512, help="MLP width")
    verb.add_argument("--n-heads", type=int, default=12, help="attention heads of 16 dimensions")
    verb.add_argument("--n-ctx", type=int, default=256, help="context length in tokens")
    verb.add_argument("--d-vocab", type=int, default=8192, help="tokens of the byte-level BPE")


def _run_pretrain(args: argparse.Namespace) -> int:
    from sae.lm.pretrain import PretrainConfig, pretrain
    from sae.lm.transformer import TransformerConfig
    from sae.text.sources import combine, open_text

    shape = TransformerConfig(
        d_model=args.d_model, d_mlp=args.d_mlp, n_heads=args.n_heads, n_ctx=args.n_ctx, d_vocab=args.d_vocab
    )
    config = PretrainConfig(train_tokens=args.tokens, lr=args.lr, batch_contexts=args.batch_contexts, seed=args.seed)
    print(pretrain(combine([open_text(spec) for spec in args.text]), Path(args.out), shape=shape, config=config))
    return 0
