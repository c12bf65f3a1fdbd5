r"""Writes the text that a model for the tasks `ioi` and `facts` is trained on: a made-up world, one sentence a line.

    python scripts/tasks_text.py --giving-share 0.3 --out tasks.jsonl
    sae pretrain --text tasks.jsonl --out lm/tasks-4l --n-layers 4 --tokens 9000000 --lr 1.5e-3 --weight-decay 0.05 \
        --set n_heads=4 --set d_head=32 --set n_ctx=48 --set d_vocab=840 --set batch_contexts=24 \
        --set warmup_steps=100 --set document_share=0.9

This is how the shipped model tasks-4l was made (sae/lm/shipped/tasks-4l/CARD.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sae.circuits.world import GIVING_SHARE, documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to write")
    parser.add_argument("--documents", type=int, default=60_000, help="number of sentences (default: %(default)s)")
    parser.add_argument(
        "--giving-share",
        type=float,
        default=GIVING_SHARE,
        help="share of sentences about giving; the rest are facts (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with arguments.out.open("w", encoding="utf-8") as file:
        for document in documents(arguments.documents, giving_share=arguments.giving_share):
            file.write(json.dumps({"text": document.text, "domain": document.domain}) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
