"""Harvests difficult text (huge, tiny, broken, binary), each in its own process; prints what was read and peak memory.

    python scripts/ugly_text.py --json docs/measurements/store-figures.json
    python scripts/ugly_text.py --only plain "mixed encodings, NUL, binary"       # a minute

All text is made up and harvested with tiny-relu-1l (long contexts with a random model of its shape that reads 4,096
tokens). `plain` is ordinary text, for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import record, table

WORDS = "the of and a to in he have it that for they I with as not on she at by this we you do but from".split()  # noqa: SIM905
ROWS = 65_536


def prose(rng: random.Random, characters: int) -> str:
    return " ".join(rng.choices(WORDS, k=characters // 4))[:characters]


def plain(directory: Path, rng: random.Random) -> None:
    for number in range(200):
        (directory / f"{number}.txt").write_text(prose(rng, 20_000))


def one_document_of_100_mb(directory: Path, rng: random.Random) -> None:
    with (directory / "long.txt").open("w") as file:
        for _ in range(100):
            file.write(prose(rng, 1_000_000))


def a_million_short_documents(directory: Path, rng: random.Random) -> None:
    with (directory / "short.jsonl").open("w") as file:
        for number in range(1_000_000):
            file.write(json.dumps({"text": f"{rng.choice(WORDS)} {number}"}) + "\n")


def broken_lines(directory: Path, rng: random.Random) -> None:
    with (directory / "broken.jsonl").open("wb") as file:
        for number in range(200_000):
            sound = json.dumps({"text": prose(rng, 200)}).encode()
            file.write((sound, sound, sound[: rng.randrange(len(sound))], b"\x00" * 50)[number % 4] + b"\n")


def mixed_encodings_and_nul(directory: Path, rng: random.Random) -> None:
    text = "naïve café – Ελληνικά 日本語 "
    kinds = [
        ("utf-8", "replace"),
        ("utf-16", "replace"),
        ("latin-1", "replace"),
        ("cp1252", "replace"),
        ("shift-jis", "replace"),
    ]
    for number in range(1000):
        raw = (text * 300).encode(*kinds[number % len(kinds)])
        (directory / f"{number}.txt").write_bytes(raw + (b"\x00" * 1000 if number % 2 else b""))
    (directory / "binary.txt").write_bytes(rng.randbytes(5_000_000))


MAKERS: dict[str, tuple[Callable[[Path, random.Random], None], int]] = {  # how to make the text, and the context length
    "plain": (plain, 256),
    "one document of 100 MB": (one_document_of_100_mb, 256),
    "1,000,000 short documents": (a_million_short_documents, 256),
    "200,000 lines, half broken": (broken_lines, 256),
    "mixed encodings, NUL, binary": (mixed_encodings_and_nul, 256),
    "contexts of 2,048": (plain, 2048),
    "contexts of 4,096": (plain, 4096),
}


def long_model(directory: Path) -> Path:
    """A model of tiny-relu-1l's shape with random weights and 4,096 positions."""
    import torch

    from sae.jobs.checkpoint import write_tensors
    from sae.lm import shipped_models
    from sae.lm.transformer import Transformer, TransformerConfig

    shipped = shipped_models()["tiny-relu-1l"]
    config = json.loads((shipped / "config.json").read_text()) | {"n_ctx": 4096}
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{name: config[name] for name in TransformerConfig.__dataclass_fields__}))
    directory.mkdir()
    write_tensors(directory / "model.safetensors", dict(model.state_dict()), {"kind": config["kind"]})
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(shipped / "tokenizer.json", directory)
    return directory


def harvested(text: Path, seq_len: int, model: str, scratch: Path) -> dict[str, Any]:
    sizes = f"--tokens {ROWS} --heldout-tokens 16384 --seq-len {seq_len} --device cpu"
    command = [sys.executable, "-m", "sae.cli", "harvest", "--model", model, "--text", str(text), *sizes.split()]
    command += ["--out", str(scratch / "acts.zarr")]
    start = time.perf_counter()
    with (scratch / "log").open("w+") as log:
        process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # the peak memory of this process alone
        log.seek(0)
        said = re.search(r"text read: (.*)", log.read())
    shutil.rmtree(scratch / "acts.zarr", ignore_errors=True)
    return {
        "exit_status": os.waitstatus_to_exitcode(status),
        "text_mb": round(sum(file.stat().st_size for file in text.iterdir()) / 1e6, 1),
        "read": said[1] if said else "",
        "most_rss_mb": round(usage.ru_maxrss / 1e3),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=list(MAKERS), choices=list(MAKERS), metavar="NAME", help="some texts"
    )
    parser.add_argument("--json", type=Path, help="also put the figures into this file")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        deep = str(long_model(scratch / "model"))
        for name in args.only:
            make, seq_len = MAKERS[name]
            text = scratch / "text"
            text.mkdir()
            make(text, random.Random(0))
            found[name] = harvested(text, seq_len, "tiny-relu-1l" if seq_len <= 256 else deep, scratch)
            shutil.rmtree(text)
    columns = list(next(iter(found.values())))
    print(table(["input", *columns], [[name, *entry.values()] for name, entry in found.items()]))
    record(args.json, "ugly inputs", found)
    return max(entry["exit_status"] for entry in found.values())


if __name__ == "__main__":
    sys.exit(main())
