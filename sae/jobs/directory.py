"""What a resumable run keeps in its directory: the settings it was started with, and a log."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from store.common import write_bytes, write_json

RETIRED = {"older_sha256"}  # version 0.1 recorded it of a model; nothing compares it now


def claim(directory: Path, name: str, settings: Mapping[str, Any], absent: Mapping[str, Any] | None = None) -> None:
    """Writes `settings` to `directory/name`; if the file exists, checks that it holds the same settings.

    `absent` gives the value of settings that an earlier version did not record.
    Raises: ValueError naming each differing key with both values; then nothing is changed.
    """
    path = directory / name
    asked = json.loads(json.dumps(settings))
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, asked)
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --out, or delete {directory}.") from error
    differing = list(_differences(held, asked, json.loads(json.dumps(absent or {})), ""))
    if differing:
        raise ValueError(
            f"{directory} holds a run with other settings: {'; '.join(differing)}. Repeat the command that "
            "started it, or choose another --out."
        )


def _differences(held: Any, asked: Any, absent: Any, where: str) -> list[str]:
    if isinstance(held, dict) and isinstance(asked, dict):
        found = []
        for key in sorted({*held, *asked} - RETIRED):
            meant = absent.get(key) if isinstance(absent, Mapping) else None
            found += _differences(held.get(key, meant), asked.get(key), meant, f"{where}.{key}" if where else key)
        return found
    return [] if held == asked else [f"{where} is {held!r} there, {asked!r} asked for"]


def cut_log(path: Path, step: int) -> None:
    """Removes the lines of a metrics.jsonl after `step`, and a last line cut short by a kill."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_bytes(path, "".join(line + "\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
