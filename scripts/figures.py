"""One JSON of measured figures, a section for each measurement, each with the hardware and the day it ran."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def record(path: Path | None, section: str, figures: Any) -> None:
    """Puts `figures` into a section of the file; the others stay as they are."""
    if path is None:
        return
    held = json.loads(path.read_text()) if path.exists() else {}
    held[section] = {"measured": circumstances(), "figures": figures}
    path.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")


def circumstances() -> dict[str, Any]:
    """The day, the processor, what else it was doing, and the versions that matter."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load_1_min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("zarr", "numpy")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A markdown table; numbers with thousands separated, yes and no."""

    def shown_as(cell: Any) -> str:
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        return f"{cell:,}" if isinstance(cell, int) else str(cell)

    shown = [[shown_as(cell) for cell in row] for row in rows]
    return "\n".join(["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *shown]])
