"""Machines that lack something: a writable home, UTF-8 output, room on the disk, Unix calls."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FewRows, random_sae

import store.common
from sae import pipeline
from sae.cli import main
from sae.dictionary.files import save
from sae.jobs.checkpoint import CheckpointError, read_tensors, write_tensors
from sae.lm import NativeModel
from sae.training import loop
from sae.training.recipes import resolve
from store.common import DiskFull, atomic_write, explaining_full_disk, full_disk, reserve, write_bytes

ROOT = Path(__file__).resolve().parent.parent


def run_python(program: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Runs a program with these environment variables; None removes one."""
    changed = {**os.environ, "PYTHONPATH": str(ROOT)} | {k: v for k, v in variables.items() if v is not None}
    kept = {name: value for name, value in changed.items() if variables.get(name, "") is not None}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=300
    )


# --- output that is not UTF-8 ----------------------------------------------------------------------------------------

SIGNS = "‖x − x̂‖² × 5, “quoted”, Ω 😀"


@pytest.fixture
def named_with_signs(tmp_path: Path) -> Path:
    """A dictionary whose config holds many signs, which `sae info` prints."""
    sae = random_sae(8)
    return save(sae, tmp_path / "d", {"recipe": SIGNS})


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, *arguments: str) -> str:
    """What a verb prints into a file of this encoding."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors=errors))
    assert main(list(arguments)) == 0
    sys.stdout.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "cp437", "shift_jis"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_no_character_is_lost_in_an_encoding_that_lacks_it(
    encoding: str, errors: str, named_with_signs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = printed(monkeypatch, "utf-8", "strict", "info", str(named_with_signs))
    assert SIGNS in whole
    found = printed(monkeypatch, encoding, errors, "info", str(named_with_signs))
    escape = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
    assert escape.sub(lambda match: chr(int(next(filter(None, match.groups())), 16)), found) == whole


def test_a_handler_that_the_user_chose_stays(named_with_signs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "?x ? x??? ? 5, ?quoted?, ? ?" in printed(monkeypatch, "ascii", "replace", "info", str(named_with_signs))


def test_a_name_that_is_no_text_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, out = save(random_sae(8), tmp_path / "d", {}), os.fsdecode(bytes(tmp_path) + b"/\xff")
    assert "\\udcff" in printed(monkeypatch, "utf-8", "strict", "export", str(sae), "--out", out)


# --- no home, nothing to write to ------------------------------------------------------------------------------------

LOOPS = "from sae.kernels import cpu_loops as c; import numpy as np; print(c.kth_largest(np.ones(3, np.float32), 3, 1))"


def test_without_a_home_compiled_loops_are_kept_elsewhere_and_it_is_said(tmp_path: Path) -> None:
    done = run_python(
        "from sae.kernels import compiler_cache as n; from pathlib import Path\n"
        "n._can_be_made = lambda place, real=n._can_be_made: 'sae' not in Path(place).parts and real(place)\n" + LOOPS,
        HOME=os.devnull,
        XDG_CACHE_HOME=None,
        NUMBA_CACHE_DIR=None,
        TMPDIR=str(tmp_path),
    )
    assert done.stdout == "1.0\n", done.stderr
    assert done.stderr.count("so numba keeps its compiled loops in") == 1
    (kept,) = tmp_path.glob("monosem-numba-*")
    assert kept.stat().st_mode & 0o077 == 0  # nobody else can put code there
    assert list(kept.rglob("*.nbc"))


def test_a_directory_of_another_user_is_not_trusted_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.kernels import compiler_cache

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / f"monosem-numba-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(OSError, match=r"belongs to another user|exists"):
        compiler_cache._private_temporary_directory("numba")


def test_without_a_home_triton_keeps_its_kernels_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.kernels import compiler_cache

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))  # can be written: nothing changes
    compiler_cache.choose_triton_directory()
    assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TRITON_HOME", os.devnull)
    with pytest.warns(UserWarning, match="so triton keeps its compiled kernels in"):
        compiler_cache.choose_triton_directory()
    (kept,) = tmp_path.glob("monosem-triton-*")
    assert os.environ["TRITON_CACHE_DIR"] == str(kept)
    compiler_cache.choose_triton_directory()  # once


def test_a_cache_that_cannot_be_written_does_not_stop_the_loops(tmp_path: Path) -> None:
    done = run_python(
        "import errno\nfrom numba.core import caching\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "caching.IndexDataCacheFile.save = full\n" + LOOPS,
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert done.stdout == "1.0\n", done.stderr
    assert done.stderr.count("cannot keep its compiled loops") == 1


def test_a_damaged_cache_is_compiled_again(tmp_path: Path) -> None:
    for said in (0, 1):
        done = run_python(LOOPS, NUMBA_CACHE_DIR=str(tmp_path))
        assert done.stdout == "1.0\n", done.stderr
        assert done.stderr.count("cannot keep its compiled loops") == said
        for file in tmp_path.rglob("*.nb?"):
            file.write_bytes(file.read_bytes()[:40])


def test_with_nothing_to_write_to_the_loops_are_compiled_all_the_same() -> None:
    done = run_python(
        "from numba.core import caching\n"
        "def refused(*_): raise PermissionError(13, 'Permission denied')\n"
        "caching._CacheLocator.ensure_cache_path = refused\n" + LOOPS
    )
    assert done.stdout == "1.0\n", done.stderr
    assert done.stderr.count("cannot keep its compiled loops") == 1


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid():
        pytest.skip("mounting takes root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


class FillingDisk:
    """Lets this many durable writes through, then none, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
        self.left, self._real = writes, store.common.fsync
        monkeypatch.setattr(store.common, "fsync", self._fsync)

    def _fsync(self, path: Any) -> None:
        if self.left == 0 and not os.path.isdir(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= not os.path.isdir(path)
        self._real(path)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def train_quickly(out: Path) -> None:
    _, config = resolve("topk", d_sae=32, tokens=640, batch_tokens=16, k=2)
    loop.train(FewRows(), out, config, save_minutes=0, kernels="reference")


def without_speed(found: dict[str, bytes]) -> dict[str, bytes]:
    return found | {"metrics.jsonl": re.sub(rb'"(rows_per_s|stall_share)": [0-9.]+', b"", found["metrics.jsonl"])}


def test_training_continues_after_a_full_disk_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_quickly(tmp_path / "sound")
    out = tmp_path / "out"
    for writes in (0, 1, 5):  # before train.json, before the first state, later
        with monkeypatch.context() as patch:
            FillingDisk(patch, writes)
            with pytest.raises(DiskFull, match=re.escape(f"{out} could not be written: No space left")) as stopped:
                train_quickly(out)
        kept = "Nothing was saved yet." if writes < 2 else "Everything up to step 5 is saved."
        assert kept in str(stopped.value)
        assert not list(out.rglob("*.partial"))
    train_quickly(out)
    assert without_speed(files(out)) == without_speed(files(tmp_path / "sound"))


@pytest.mark.parametrize("format", ["native", "sae-lens", "dictionary-learning", "sparsify"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_an_export_is_whole_or_nothing(
    format: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, out, sound = random_sae(8, d_sae=16, activation="topk", k=2), tmp_path / "out", tmp_path / "sound"
    if there:
        out.mkdir()
    pipeline.export(sae, format, sound)
    for writes in range(len(files(sound))):
        with monkeypatch.context() as patch:
            FillingDisk(patch, writes)
            with pytest.raises(DiskFull, match="Nothing of it is kept"):
                pipeline.export(sae, format, out)
        assert out.exists() == there
        assert not there or not list(out.iterdir())
    pipeline.export(sae, format, out)
    assert files(out) == files(sound)


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    out = tmp_path_factory.mktemp("full") / "d"
    pipeline.train(tiny_store, out, recipe="topk", d_sae=48, l0=4, tokens=2048, config={"batch_tokens": 128})
    return out


def test_an_evaluation_that_found_no_room_is_not_taken_for_a_finished_one(
    dictionary: Path, tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for writes in (0, 1):
        with monkeypatch.context() as patch:
            FillingDisk(patch, writes)
            with pytest.raises(DiskFull, match="No space left on device"):
                pipeline.evaluate(dictionary, model=tiny_model)
        assert not (dictionary / "eval.json").exists()  # its presence says that all is there
    pipeline.evaluate(dictionary, model=tiny_model)
    assert (dictionary / "eval.json").exists()


def test_a_really_full_disk_in_every_verb_that_writes(
    small_disk: Path, dictionary: Path, tiny_store: Path, tiny_model: NativeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's own errors: through safetensors (Rust), memory maps (else SIGBUS), zarr and plain files."""
    (small_disk / "ballast").write_bytes(bytes(395_000))
    trained = ["train", "--acts", tiny_store, "--recipe", "topk", "--d-sae", "48", "--l0", "4", "--tokens", "2048"]
    out = small_disk / "out"
    for arguments in (
        [*trained, "--batch-tokens", "128", "--out", out],
        ["export", dictionary, "--format", "native", "--out", out],
        ["export", dictionary, "--format", "sae-lens", "--out", out],
        ["store", "export-numpy", tiny_store, "--out", out],
        ["store", "subset", tiny_store, "--out", out],
    ):
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert f"{out} could not be written: No space left on device" in said, said
        assert not list(small_disk.glob("*.creating"))
        shutil.rmtree(out, ignore_errors=True)
    with pytest.raises(DiskFull, match="The unfinished index is removed"):
        pipeline.index(dictionary, model=tiny_model, out=out)
    assert [entry.name for entry in small_disk.iterdir()] == ["ballast"]
    grow(small_disk)
    pipeline.index(dictionary, model=tiny_model, out=out)


def test_a_limit_on_the_size_of_files_is_told_like_a_full_disk(tmp_path: Path) -> None:
    """`ulimit -f`, and disks that hold no file above 4 GB; here the system itself refuses, whoever runs the test."""
    done = run_python(
        "import resource, torch\nfrom sae.jobs.checkpoint import write_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"write_tensors({str(tmp_path / 'x.safetensors')!r}, {{'x': torch.zeros(9999)}}, {{}})"
    )
    assert "DiskFull" in done.stderr
    assert "x.safetensors could not be written: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), os.strerror(errno.ENOSPC)),
        (OSError(errno.EDQUOT, "x"), os.strerror(errno.EDQUOT)),
        (RuntimeError("I/O error: No space left on device (os error 28)"), os.strerror(errno.ENOSPC)),
        (OSError(errno.EACCES, "x"), None),
        (OSError("no number"), None),
        (ValueError("28"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_what_counts_as_a_full_disk(error: BaseException, reason: str | None, tmp_path: Path) -> None:
    assert full_disk(error) == reason
    with pytest.raises(DiskFull if reason else type(error)), atomic_write(tmp_path / "file"):
        raise error
    assert list(tmp_path.iterdir()) == []
    if reason:
        told = pytest.raises(DiskFull, match=r"place could not be written: .* All is kept\. Make room")
        with told, explaining_full_disk("place", lambda: "All is kept."), atomic_write(tmp_path / "other"):
            raise error


def test_another_fault_of_the_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path / "file"))), atomic_write(tmp_path / "file"):
        raise RuntimeError("I/O error: Permission denied (os error 13)")
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(tmp_path / "file")
    write_tensors(tmp_path / "file", {"x": torch.ones(2)}, {})
    assert read_tensors(tmp_path / "file")[0]["x"].tolist() == [1, 1]


def test_reserved_files_keep_their_bytes_and_take_their_room(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    held = np.memmap(path, np.uint8, "w+", shape=(1 << 20,))
    held[:3] = 1, 2, 3
    reserve(path)
    assert path.stat().st_blocks * 512 >= 1 << 20
    assert held[:4].tolist() == [1, 2, 3, 0]
    write_bytes(tmp_path / "empty", b"")
    reserve(tmp_path / "empty")


# --- no Unix ---------------------------------------------------------------------------------------------------------

WITHOUT_UNIX = """
import os, select, signal, sys
sys.modules |= dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios"))  # importing them fails
for module, names in ((os, "sysconf posix_fallocate getuid geteuid pwrite pread O_CLOEXEC sched_getaffinity"),
                      (signal, "SIGUSR1 SIGUSR2 SIGHUP"), (select, "poll")):
    for name in names.split():
        if hasattr(module, name): delattr(module, name)
"""


def test_every_module_imports_without_unix_calls_and_reading_works(dictionary: Path) -> None:
    done = run_python(
        "import pkgutil, importlib, numpy, torch, zarr, safetensors, tokenizers, tqdm, numba, pandas\n"
        + WITHOUT_UNIX
        + "import sae, store\n"
        "for package in (sae, store):\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not any(part in found.name for part in ('triton', '__main__', 'parquet', 'bridge', 'pareto')):\n"
        "            importlib.import_module(found.name)\n"
        f"print(sae.load({str(dictionary)!r}).encode(torch.zeros(1, 32)).shape)\n"
        "from sae.cli import main\n"
        f"assert main(['info', {str(dictionary)!r}]) == 0\n"
        f"assert main(['export', {str(dictionary)!r}, '--out', {str(dictionary.parent / 'windows')!r}]) == 0\n"
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 48])" in done.stdout


def test_writing_a_store_without_file_locks_says_what_is_supported(tmp_path: Path) -> None:
    done = run_python(
        "import zarr\n" + WITHOUT_UNIX + "from pathlib import Path; from store.common import exclusive_lock\n"
        f"with exclusive_lock(Path({str(tmp_path / 'x.lock')!r}), 'x'): pass"
    )
    assert "StoreError" in done.stderr
    assert "On Windows run monosem in WSL" in done.stderr
