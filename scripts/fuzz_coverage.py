"""Runs one parser of scripts/fuzz.py under atheris, which keeps and mutates the inputs that reach new code.

    python scripts/fuzz_coverage.py PARSER INPUTS SEED

fuzz.py starts it where atheris is installed.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sae", "store"]):  # atheris follows only what is imported here
    import fuzz

    import sae.jobs.checkpoint
    import sae.text.sources
    import sae.text.tokenizer  # noqa: F401


def main(name: str, inputs: int, seed: int) -> None:
    parser, sound = fuzz.seeds()[name]

    def mutate(raw: bytes, max_bytes: int, mutation: int) -> bytes:
        """Edits by atheris, and for 30% valid JSON of the wrong kind, which edits of bytes rarely produce."""
        rng = random.Random(mutation)
        return fuzz.other_value(raw, rng)[:max_bytes] if rng.random() < 0.3 else atheris.Mutate(raw, max_bytes)

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "sound").write_bytes(sound)
        atheris.Setup(
            ["fuzz", f"-runs={inputs}", f"-seed={seed + 1}", "-max_len=8192", directory],
            lambda raw: fuzz.accepts_or_refuses(parser, raw),
            custom_mutator=mutate,
        )
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
