"""Damages a small activation store in every known way; prints whether it was detected, named and repaired.

    python scripts/damage.py --json docs/measurements/store-figures.json

The store is a harvest of the shipped model; repaired means: the same bytes as before. A shard is one Zarr chunk with
its checksum at the end. The full disk is a small tmpfs and needs root; without root that row says that it did not run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_injection as faults
from figures import record, table

from sae import pipeline
from sae.lm import LanguageModel, load_model
from sae.text.sources import TextSource
from store.activations import ActivationStore
from store.common import DiskFull, StoreError

HOOK = pipeline.DEFAULT_HOOK_POINT
SIZE = {"tokens": 16_384, "heldout_tokens": 16_384}  # one context of 256 for each lane and split
Row = dict[str, Any]


def shard(store: Path, number: int = 70) -> Path:
    return store / "hooks" / HOOK / "acts" / "c" / str(number) / "0"  # 70: training shard 6


def marker(store: Path, number: int = 6) -> Path:
    return store / "markers" / "train" / f"{number:08d}.json"


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "bit flip in data": lambda s: flip(shard(s), 100),
    "bit flip in the file's own checksum": lambda s: flip(shard(s), -2),
    "truncated shard": lambda s: os.truncate(shard(s), 1000),
    "0-byte shard": lambda s: os.truncate(shard(s), 0),
    "deleted shard": lambda s: shard(s).unlink(),
    "another shard's file": lambda s: shutil.copy(shard(s, 71), shard(s)),
    "deleted marker": lambda s: marker(s).unlink(),
    "foreign marker": lambda s: shutil.copy(marker(s, 7), marker(s)),
    "torn marker": lambda s: os.truncate(marker(s), 40),
    "0-byte marker": lambda s: os.truncate(marker(s), 0),
}


def row(damage: str, detected: bool, said: str, repaired: bool | str) -> Row:
    return {"damage": damage, "detected": detected, "said": said, "repaired": repaired}


def damaged(sound: Path, scratch: Path, model: LanguageModel, source: TextSource) -> list[Row]:
    expected, rows = faults.files(sound), []
    for name, act in DAMAGE.items():
        store = Path(shutil.copytree(sound, scratch / "damaged.zarr"))
        act(store)
        said = pipeline.verify(store)
        _, left = pipeline.repair(store, model=model, text=source)
        same = not left and faults.files(store) == expected
        rows.append(row(name, bool(said), "; ".join(said).replace(f"{store}/", ""), same))
        shutil.rmtree(store)
    return rows


def second_writer(sound: Path) -> Row:
    store = ActivationStore.open(sound)
    with store.hold([6]):
        try:
            with ActivationStore.open(sound).hold([6]):
                return row("two writers of a lane", False, "", False)
        except StoreError as error:
            said = str(error).replace(f"{sound.parent}/", "").replace(f" on {platform.node()}", " on this machine")
    return row("two writers of a lane", f"pid {os.getpid()}" in said, said, "nothing was written")


def read_during_write(scratch: Path) -> Row:
    """A writer process fills a store while this process repeatedly reads everything that is committed."""
    out = scratch / "growing.zarr"
    faults.create(out)
    writer = multiprocessing.get_context("spawn").Process(target=faults.write, args=(str(out), 0, 1))
    writer.start()
    tally, known = faults.Tally("store", 1), set[tuple[str, int]]()
    looks = 0
    while writer.is_alive():
        known = faults.check(ActivationStore.open(out), known, tally)
        looks += 1
        time.sleep(0.01)
    said = (
        f"{looks} passes, {tally.shards_checked:,} shards read, {tally.wrong_rows} wrong rows, {tally.lost_shards} lost"
    )
    return row("read during write", tally.sound and looks > 5, said, "nothing to repair")


def full_disk(scratch: Path, sound: Path, model: LanguageModel, source: TextSource) -> Row:
    name, disk = "full disk in the middle of a harvest", scratch / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        return row(name, False, "did not run: needs root to mount a tmpfs", "did not run")
    try:
        return _disk_filled_during_harvest(disk, name, sound, model, source)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _disk_filled_during_harvest(disk: Path, name: str, sound: Path, model: LanguageModel, source: TextSource) -> Row:
    """Another program fills the disk during the harvest, after its forecast has found enough space."""
    out, ballast, said, shards = disk / "acts.zarr", disk / "ballast", "", 0
    real = ActivationStore.write_shard

    def writing(self: ActivationStore, *args: Any, **how: Any) -> Any:
        nonlocal shards
        shards += 1
        if shards == 20:
            ballast.write_bytes(b"x" * 20_000_000)
        return real(self, *args, **how)

    ActivationStore.write_shard = writing  # type: ignore[method-assign]
    try:
        pipeline.harvest(model, source, out, **SIZE)
    except DiskFull as error:
        said = str(error).replace(f"{disk}/", "")
    finally:
        ActivationStore.write_shard = real  # type: ignore[method-assign]
    left = [text for text in pipeline.verify(out) if "shards are written" not in text]
    ballast.unlink()
    pipeline.harvest(model, source, out, **SIZE)
    return row(name, bool(said) and not left, said, faults.files(out) == faults.files(sound))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also put the figures into this file")
    args = parser.parse_args()
    model, default = load_model("tiny-relu-1l"), pipeline.source_of("default")
    documents = list(default.documents())[:4000]
    source = TextSource("part of the default text", lambda _: iter(documents), default.fingerprint)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        sound = Path(pipeline.harvest(model, source, scratch / "sound.zarr", **SIZE))
        rows = damaged(sound, scratch, model, source)
        rows += [second_writer(sound), read_during_write(scratch), full_disk(scratch, sound, model, source)]
    print(table(list(rows[0]), [list(entry.values()) for entry in rows]))
    record(args.json, "damage", rows)
    return 0 if all(entry["detected"] and entry["repaired"] for entry in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
