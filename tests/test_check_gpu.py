"""The check for GPUs goes through all of its stages, whatever becomes of one of them."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = {"machine": "about_the_machine"}


@pytest.fixture
def check_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")  # as when the script is run: it imports other scripts
    return importlib.import_module("check_gpu")


def test_every_stage_is_reached_and_written_at_once(
    check_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stages are those that the script's own text lists, in that order; one of them fails here."""
    stages = re.findall(r"^- ([a-z]+): ", check_gpu.__doc__ or "", re.MULTILINE)
    assert {"machine", "tests", "twin", "capture", "sanitizer", "bench", "profile", "begin", "train"} < set(stages)
    out, before = tmp_path / "gpu.json", []

    def stub(name: str) -> Any:
        def stage(*args: Any) -> dict[str, str]:
            before.append((name, list(json.loads(out.read_text())) if out.exists() else []))
            if name == "twin":
                raise RuntimeError("a twin differs")
            if name == "bench":  # saves each of its figures itself
                args[2]("bench", {})
            return {"name": name}

        return stage

    for name in stages:
        monkeypatch.setattr(check_gpu, FUNCTIONS.get(name, name), stub(name))
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--rehearse", "--json", str(out)])
    assert check_gpu.main() == 1
    assert before == [(name, stages[:n]) for n, name in enumerate(stages)]
    found = json.loads(out.read_text())
    assert [name for name, each in found.items() if "failed" in each] == ["twin"]
    assert "a twin differs" in found["twin"]["failed"]


def test_a_peer_that_cannot_be_installed_is_left_out_with_the_reason(
    check_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_gpu, "find_spec", lambda name: None)

    def no_network(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, int("pip" in command), "", "trying\nERROR: no index is reachable\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    found = check_gpu.sparsify(check_gpu.Setting(rehearsal=True))
    assert found == {"skipped": "eai-sparsify could not be installed: ERROR: no index is reachable"}
