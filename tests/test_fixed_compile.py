"""The kernels of the fixed-shape step compile for GPUs, without one; `scripts/check_tritons.sh` takes all variants."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
MOST_REGISTERS = 168  # with which 12 warps of 32 threads fit into 65,536 registers
STAGES = {"prepare", "collect", "choose", "keep_largest", "explain", "fill", "learn_decoder", "learn_encoder"}
TRITONS = os.environ.get("MONOSEM_TRITONS")  # where scripts/check_tritons.sh has installed other versions
on_request = pytest.mark.skipif(TRITONS is None, reason="takes minutes; scripts/check_tritons.sh runs it")


def compiled(tmp_path: Path, *targets: str, packages: Path | None = None) -> list[list[str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(map(str, filter(None, [packages, ROOT, os.environ.get("PYTHONPATH")])))
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "compile_fixed_step.py"), *targets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def assert_in_registers(lines: list[list[str]], target: str) -> None:
    read = [line for line in lines if len(line) > 4]
    assert bool(read) == target.startswith("sm_"), "the tool to read registers, which comes with triton, is for NVIDIA"
    for line in read:
        assert int(line[4]) <= MOST_REGISTERS, line
        assert int(line[6]) == 0, line


def test_kernels_compile_for_nvidia_and_keep_their_numbers_in_registers(tmp_path: Path) -> None:
    """One variant of each kernel at d_in 512 and one at 4,096, for an H100."""
    lines = compiled(tmp_path, "--few", "sm_90")
    assert {line[1] for line in lines} >= STAGES
    assert {line[2] for line in lines} == {"512", "4096"}
    assert_in_registers(lines, "sm_90")


def test_kernels_compile_for_amd(tmp_path: Path) -> None:
    """One variant of each kernel for an MI300: the last one, at d_in 4,096 if there is one."""
    names = [line[1] for line in compiled(tmp_path, "--few", "gfx942")]
    assert set(names) >= STAGES
    assert len(names) == len(set(names))


@on_request
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_variant_compiles_for_every_gpu(tmp_path: Path, target: str) -> None:
    """For an A100, an H100, a B200 and an MI300; each a test, for processes to share."""
    lines = compiled(tmp_path, target)
    assert {(line[0], line[2]) for line in lines} == {(target, "512"), (target, "4096")}
    assert_in_registers(lines, target)


@on_request
@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "targets", "most_registers", "most_local"),
    [
        ("3.2.0", ["sm_80", "sm_90"], 234, 16),  # it knows no B200
        ("3.6.0", ["sm_80", "sm_90", "sm_100", "gfx942"], 180, 0),  # 180 in `collect` on an A100, d_in 4,096
    ],
)
def test_every_variant_compiles_with_other_versions_of_triton(
    tmp_path: Path, version: str, targets: list[str], most_registers: int, most_local: int
) -> None:
    """They need somewhat more registers than the pinned version, and bytes of local memory for a few."""
    packages = Path(TRITONS or "") / version
    if not packages.is_dir():
        pytest.skip("scripts/check_tritons.sh installs this version and runs this test")
    lines = compiled(tmp_path, *targets, packages=packages)
    assert {line[0] for line in lines} == set(targets)
    assert len(lines) > 20 * len(targets)
    read = [line for line in lines if len(line) > 4]
    assert read
    assert not [line for line in read if int(line[4]) > most_registers or int(line[6]) > most_local]
