r"""Writes the text that a model for the tasks `ioi` and `facts` is trained on: a made-up world, one sentence a line.

    python scripts/tasks_text.py --out tasks.jsonl
    python scripts/tasks_text.py --documents 24000 --giving-share 0.1 --out facts.jsonl
    sae pretrain --text tasks.jsonl --out lm/1 --n-layers 4 --tokens 3000000 --lr 2e-3 --weight-decay 0.05 \
        --set n_heads=4 --set d_head=32 --set n_ctx=48 --set d_vocab=840 --set batch_contexts=64
    sae pretrain --text tasks.jsonl --from lm/1 --out lm/2 --tokens 4500000 --lr 2e-3 --weight-decay 0.05 \
        --keep-at 737280 --set batch_contexts=64 --set warmup_steps=50
    sae pretrain --text tasks.jsonl --from lm/2/kept/737280-tokens --out lm/3 --tokens 1600000 --lr 1.5e-3 \
        --weight-decay 0.05 --keep-at 606528 --set batch_contexts=12 --set warmup_steps=50 --set document_share=0.9
    sae pretrain --text facts.jsonl --from lm/3/kept/606528-tokens --out lm/4 --tokens 1000000 --lr 1e-3 \
        --weight-decay 0.05 --set batch_contexts=24 --set warmup_steps=30 --set document_share=0.9

The second and the third run may be stopped at the kept copy. These are the runs of docs/results-lenses.md, which learn
`ioi` and six facts in ten.
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
