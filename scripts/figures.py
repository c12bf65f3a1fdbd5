"""How scripts report: a markdown table on the screen, and a JSON file with one section for each measurement."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine

NUMBER = re.compile(r"[-+−–]?[\d.,]+\b|–?$")  # at the start of a cell; an empty cell or a dash has no number


def record(path: Path | None, section: str, figures: Any) -> None:
    """Writes `figures` into a section of the JSON file, with the machine; the other sections stay as they are."""
    if path is None:
        return
    held = json.loads(path.read_text()) if path.exists() else {}
    held[section] = {"measured": machine.hardware(), "figures": figures}
    path.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table. Integers get thousands separators, booleans become yes or no, numbers are aligned right."""
    shown = [[_cell(value) for value in row] for row in rows]
    numeric = [bool(rows) and all(NUMBER.match(row[i]) for row in shown) for i in range(len(columns))]
    lines = [_line(columns), "|" + "|".join("--:" if right else "---" for right in numeric) + "|"]
    return "\n".join([*lines, *map(_line, shown)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)
