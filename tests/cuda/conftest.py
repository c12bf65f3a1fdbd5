"""Tests for a CUDA device, on an image that has pytest, torch, Triton, numpy and safetensors, and perhaps nothing else.

    python -m pytest -m cuda --confcutdir=tests/cuda tests/cuda

Without the option the conftest of all tests is loaded too, which needs every package of this project. What a test
imports beyond that image it asks for with `pytest.importorskip`. With MONOSEM_REHEARSAL=1 they run on a CPU, in
Triton's interpreter and at tiny sizes, to see that they can run: what only a GPU shows is skipped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = os.environ.get("MONOSEM_REHEARSAL") == "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is made, so before any is
sys.path[:0] = [path for path in map(str, (ROOT, ROOT / "scripts", ROOT / "tests")) if path not in sys.path]

import bench_gpu  # noqa: E402

bench_gpu.stand_in_for_small_dependencies()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.cuda)
        if not torch.cuda.is_available() and not REHEARSAL:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """For what a rehearsal cannot show."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(autouse=True)
def fixed_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs plan fixed-shape steps in a rehearsal, too."""
    from sae.training import fixed_plan

    monkeypatch.setattr(fixed_plan, "runs_on", lambda device: True)
