"""Trains small models with different settings on equal tokens: which settings keep neurons dense, and at what loss?

    python scripts/pretrain_search.py OUT --text corpus.jsonl.xz --tokens 5000000 --try lr=4e-3 \\
        --try lr=4e-3,block_lr_share=0.125 --try lr=1e-3,weight_decay=0 --try lr=4e-3,d_mlp=256 --json search.json

Each --try is a run of `sae pretrain` with these settings (of `PretrainConfig` or of the architecture) in OUT, with the
learning rate's whole schedule in --tokens. All share the tokenizer and the tokens of the first run, so d_vocab must be
the same. Prints the held-out loss and the neurons' figures (`sae.lm.held_out`) at the end of each, and adds them to the
JSON. Repeat the command after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import machine
from figures import table

from sae import pipeline
from sae.lm.pretrain_config import configured
from store.common import write_json

SHARED = ("tokenizer.json", "tokens-train.npy", "tokens-heldout.npy")
COLUMNS = ("l0", "dead", "participation_ratio", "ce_gap", "score_zero_top10")


def train(out: Path, text: list[str], tokens: int, settings: str) -> dict[str, Any]:
    """The last line of the run's log."""
    shape, config = configured(filter(None, settings.split(",")), train_tokens=tokens)
    pipeline.pretrain(text, out, shape=shape, config=config)
    last: dict[str, Any] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="holds the runs")
    parser.add_argument("--text", action="append", required=True, help="text to train on; repeats")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="tokens of each run")
    parser.add_argument("--try", dest="tried", action="append", required=True, metavar="NAME=VALUE,…", help="one run")
    parser.add_argument("--json", type=Path, help="file of results; added to")
    args = parser.parse_args()
    for settings in args.tried:  # all checked before any run
        configured(filter(None, settings.split(",")))
    entries: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    first: Path | None = None
    for text in args.tried:
        run = args.out / text.replace(",", "-").replace("=", "")
        if first is not None and not run.exists():
            run.mkdir(parents=True)
            for name in SHARED:
                shutil.copyfile(first / name, run / name)
        entries[text] = {"hardware": machine.hardware(), **train(run, args.text, args.tokens, text)}
        first = first or run
        if args.json:
            write_json(args.json, entries)
    rows = [
        [text, f"{entries[text]['tokens']:,}", f"{entries[text]['held_out_loss']:.3f}", layer]
        + [layer_figures[name] for name in COLUMNS]
        for text in args.tried
        for layer, layer_figures in enumerate(entries[text].get("neurons", []))
    ]
    print(table(["settings", "tokens", "held-out loss", "layer", *COLUMNS], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
