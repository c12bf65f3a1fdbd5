"""Feeds damaged bytes to every parser of files; stops at the first input that is neither read nor refused.

    python scripts/fuzz.py --inputs 1000000 --json docs/measurements/store-figures.json
    python scripts/fuzz.py --inputs 500 --only marker jsonl                       # seconds

With atheris installed (`pip install atheris`) the search follows the code's coverage (`fuzz_coverage.py`); otherwise
inputs are random mutations of sound files. A parser may return a consistent result, or raise an error of the ValueError
family that names the file.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from figures import record

from store.activation_layout import metadata_files, parse_attributes
from store.common import StoreError
from store.shards import Marker, parse_marker

ATTRIBUTES = {
    "kind": "activations",
    "format": 1,
    "seq_len": 8,
    "contexts_per_shard": 2,
    "lanes": 64,
    "provenance": {"text": "x"},
    "dtype": {"blocks.0.mlp.hook_post": "float16"},
    "hook_points": {"blocks.0.mlp.hook_post": 4},
    "n_shards": {"heldout": 1, "train": 3},
}
WORDS = [b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"../x"', b"\x00", b"\xff", b'"', b"}"]
Parser = Callable[[bytes], Any]


def attributes(raw: bytes) -> None:
    found = parse_attributes(raw, "zarr.json")
    assert found["seq_len"] > 0
    assert set(found["n_shards"]) == {"heldout", "train"}
    assert all(".." not in hook.split("/") and "/" not in hook for hook in found["hook_points"])


def marker(raw: bytes) -> None:
    found = parse_marker(raw, 3, "00000003.json")
    assert found.shard == 3
    assert found.kept_rows <= found.rows
    again = parse_marker(json.dumps(found.to_json()).encode(), 3, "again")
    assert again.to_json() == found.to_json()
    assert all(np.isfinite(vector).all() for vector in found.sum.values())


def jsonl(raw: bytes) -> None:
    from sae.text.documents import Document, TextReport
    from sae.text.files import read_jsonl

    report = TextReport()
    documents = list(read_jsonl(io.BytesIO(raw), "t.jsonl", report))
    assert all(isinstance(document, Document) for document in documents)
    lines = sum(1 for line in io.BytesIO(raw) if line.strip())
    assert len(documents) + report.broken_lines == lines  # each line is a document or is counted


def tokenizer(raw: bytes) -> None:
    from sae.text.tokenizer import parse_tokenizer

    parse_tokenizer(raw, "tokenizer.json").encode("plain text", add_special_tokens=False)


def safetensors(raw: bytes) -> None:
    from sae.jobs.checkpoint import read_tensors

    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(raw)
        file.flush()
        tensors, header = read_tensors(file.name)
    assert isinstance(header, dict)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= len(raw)


def seeds() -> dict[str, tuple[Parser, bytes]]:
    """Each parser with a sound file."""
    made = Marker(
        3,
        16,
        2,
        14,
        {"tokens/c/4/0": {"bytes": 68, "crc32c": 7}},
        {"h": np.arange(4.0)},
        {"h": 2.5},
        {"document": 3, "token": 1},
        {5: ("id", "source", "domain", "ab")},
    )
    lines = [{"text": "a\u00e9 b", "id": 1}, {"text": "two", "domain": "d"}, {"no": 1}, ["x"], {"text": None}]
    return {
        "attributes": (attributes, metadata_files(ATTRIBUTES)["zarr.json"]),
        "marker": (marker, json.dumps(made.to_json()).encode()),
        "jsonl": (jsonl, "\n".join(json.dumps(line) for line in lines).encode()),
        "tokenizer": (tokenizer, _sound_tokenizer()),
        "safetensors": (safetensors, _sound_tensors()),
    }


def _sound_tokenizer() -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    return made.to_str().encode()


def _sound_tensors() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"W": torch.ones(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, {"json": '{"step": 1}'})


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """A few edits: flipped bits, inserted words of JSON, cuts, repetitions, copied bytes."""
    data = bytearray(raw)
    for _ in range(rng.randrange(1, 5)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.choice(WORDS)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 12)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        elif kind == 4 and data:
            other = rng.randrange(len(data))
            data[at : at + 8] = data[other : other + 8]
        else:
            del data[at:]
    return bytes(data)


def other_value(raw: bytes, rng: random.Random) -> bytes:
    """A JSON file with one value, at any depth, replaced by another kind; bytes that are not JSON are mutated."""
    try:
        whole = json.loads(raw)
    except ValueError:
        return mutated(raw, rng)
    node, step = whole, None
    holder: Any = None
    while isinstance(node, dict | list) and node and (holder is None or rng.random() < 0.7):
        holder, step = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = node[step]
    if holder is not None:
        holder[step] = rng.choice([None, True, -1, 0, 2**70, 1.5, "", "x", "../../x", [], {}, [1], {"a": 1}, "é" * 50])
    return json.dumps(whole).encode()


def accepts_or_refuses(parser: Parser, raw: bytes) -> bool:
    """Whether the parser accepted the bytes. Raises what no parser may raise: anything but the ValueError family."""
    try:
        parser(raw)
    except AssertionError:
        raise
    except (StoreError, ValueError):
        return False
    return True


def fuzz(name: str, parser: Parser, sound: bytes, inputs: int, seed: int) -> tuple[int, float]:
    """Tries `inputs` mutations; returns how many were accepted, and the seconds it took."""
    rng, start = random.Random(f"{seed}-{name}"), time.perf_counter()
    assert accepts_or_refuses(parser, sound), f"{name}: the sound file was refused"
    accepted = 0
    for _ in range(inputs):
        raw = (other_value if rng.random() < 0.3 else mutated)(sound, rng)
        try:
            accepted += accepts_or_refuses(parser, raw)
        except BaseException:
            print(f"{name}: neither read nor refused: {raw!r}", file=sys.stderr)
            raise
    return accepted, time.perf_counter() - start


def follow_coverage(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """Runs one parser under atheris in a separate process. Raises: RuntimeError with its output if it stops early."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz_coverage.py")), name, str(inputs), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    ran = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
    if done.returncode or ran is None:
        raise RuntimeError(f"{name}: neither read nor refused, or stopped:\n{done.stderr[-3000:]}")
    covered = [int(found) for found in re.findall(r"cov: (\d+)", done.stderr)]
    return {"parser": name, "inputs": int(ran[1]), "seconds": int(ran[2]), "code_edges": [covered[0], covered[-1]]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="total, divided among the parsers")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations")
    names = ["attributes", "marker", "jsonl", "tokenizer", "safetensors"]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help="some of the parsers")
    parser.add_argument("--json", type=Path, help="also put the figures into this file")
    args = parser.parse_args()
    share = args.inputs // len(args.only)
    guided = find_spec("atheris") is not None
    if not guided:
        print("atheris is not installed: inputs are random mutations")
    done = []
    for name in args.only:
        if guided:
            done.append(follow_coverage(name, share, args.seed))
        else:
            accepted, seconds = fuzz(name, *seeds()[name], share, args.seed)
            done.append({"parser": name, "inputs": share, "seconds": round(seconds), "accepted": accepted})
        print(*(f"{key} {value}" for key, value in done[-1].items()), "no crash", sep="  ", flush=True)
    record(args.json, "fuzzing", {"coverage_guided": guided, "parsers": done})
    return 0


if __name__ == "__main__":
    sys.exit(main())
