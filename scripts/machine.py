"""What a measurement was made on, for the JSON files of the other scripts."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any


def described() -> dict[str, Any]:
    """Processor, cores, threads, load, GPU where there is one, versions, commit and the moment (UTC)."""
    import torch  # here: benchmarks set its environment first

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def _processor() -> str:
    """Its name with family and model: clouds hide the rest of the name."""
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
