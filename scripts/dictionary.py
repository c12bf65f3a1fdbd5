"""Makes a dictionary of a one-layer model from any text: harvest, train, evaluate, index.

    python scripts/dictionary.py --text PATH --out runs/mine

Copy this file and change it: it uses public functions only. After an interruption, repeat the command: harvest and
training resume where they stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sae


def build(
    text: list[str],
    out: Path,
    *,
    model: str = "tiny-relu-1l",
    tokens: int = 3_000_000,
    recipe: str = "matryoshka",
    d_sae: int = 4096,
    train_tokens: int = 8_000_000,
    index_tokens: int = 1_000_000,
    seed: int = 0,
    config: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs the pipeline into `out`; returns eval.json's content and the seconds each stage took."""
    acts, dictionary = out / "acts.zarr", out / f"{recipe}-{d_sae}-s{seed}"
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        result = work()
        seconds[stage] = time.monotonic() - started
        return result

    timed("harvest", lambda: sae.harvest(model, text, acts, tokens=tokens))
    timed(
        "train",
        lambda: sae.train(acts, dictionary, recipe=recipe, d_sae=d_sae, tokens=train_tokens, seed=seed, config=config),
    )
    result = timed("eval", lambda: sae.evaluate(dictionary))
    timed("index", lambda: sae.index(dictionary, tokens=index_tokens))
    return result, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", required=True, help="file, directory or dataset; may repeat")
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--model", default="tiny-relu-1l", help="directory, shipped name or hub id")
    parser.add_argument("--recipe", default="matryoshka", help="training recipe")
    parser.add_argument("--d-sae", type=int, default=4096, help="number of features")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="rows harvested")
    parser.add_argument("--train-tokens", type=int, default=8_000_000, help="rows seen in training")
    parser.add_argument("--seed", type=int, default=0, help="seed of training")
    args = parser.parse_args()
    from sae.cli.tables import eval_table

    result, seconds = build(
        args.text,
        args.out,
        model=args.model,
        tokens=args.tokens,
        recipe=args.recipe,
        d_sae=args.d_sae,
        train_tokens=args.train_tokens,
        seed=args.seed,
    )
    print(eval_table(result))
    print("\nseconds: " + ", ".join(f"{stage} {took:.0f}" for stage, took in seconds.items()))
    print(f"open it in the browser: sae browse {args.out.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
