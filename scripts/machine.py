"""What a measurement ran on, for the JSON files of the other scripts."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def hardware(**more: Any) -> dict[str, Any]:
    """Time (UTC), processor, load, versions and commit; with torch also its threads and the GPU; then `more`."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "commit": _commit(),
        **({"zarr": version("zarr")} if find_spec("zarr") else {}),
        **(_torch() if find_spec("torch") else {}),
        **more,
    }


def _torch() -> dict[str, Any]:
    import torch  # not at the top: benchmarks set its environment first, and the store's scripts run without it

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), **gpu}


def _processor() -> str:
    """Its name with family and model, because clouds hide the rest of the name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    entries = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in entries:
        return platform.processor()
    return f"{entries['model name']} (family {entries.get('cpu family')}, model {entries.get('model')})"


def _commit() -> str:
    if not shutil.which("git"):
        return ""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip()
