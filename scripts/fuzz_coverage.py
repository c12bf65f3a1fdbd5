"""One parser of scripts/fuzz.py under atheris, which keeps the inputs that reach new code and mutates those.

usage: python scripts/fuzz_coverage.py PARSER INPUTS SEED      (`fuzz.py` runs it, where atheris is installed)
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sae", "store"]):  # only what is imported inside is watched
    import fuzz

    import sae.jobs.checkpoint
    import sae.text.sources
    import sae.text.tokenizer  # noqa: F401


def main(name: str, inputs: int, seed: int) -> None:
    parser, sound = fuzz.seeds()[name]

    def mutate(raw: bytes, max_bytes: int, mutation: int) -> bytes:
        """The library's own edits, and for a third sound JSON of the wrong kind, which bytes alone rarely become."""
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
