"""Where numba and triton keep compiled code when the package and the home directory cannot be written.

numba tries NUMBA_CACHE_DIR, the source's own `__pycache__` and the user's cache directory. If none of them can be
written (in a container, on a cluster node, under Nix), importing a loop fails. This module then names a directory that
can be written, before numba is imported; umap's loops need it as much as ours.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

VARIABLE, TRITON_VARIABLE = "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR"


def choose_cache_directory() -> None:
    """Sets NUMBA_CACHE_DIR, if neither it nor the user's cache directory can be written, to a directory that can."""
    if any(_can_be_made(place) for place in _numbas_own_places()):
        return
    kept_in = next(_fallbacks(), None)
    if kept_in is None:
        return  # the loops are compiled without a cache
    os.environ[VARIABLE] = str(kept_in)  # workers that this process starts use it, too
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = str(kept_in)
    _say("numba keeps its compiled loops", kept_in, VARIABLE)


def choose_triton_directory() -> None:
    """The same for triton, which keeps its kernels in the home directory alone (TRITON_CACHE_DIR, TRITON_HOME)."""
    home = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"))
    given = os.environ.get(TRITON_VARIABLE)
    if _can_be_made(Path(given)) if given else home.is_absolute() and _can_be_made(home / ".triton"):
        return
    with suppress(OSError):
        kept_in = _private_temporary_directory("triton")
        os.environ[TRITON_VARIABLE] = str(kept_in)
        _say("triton keeps its compiled kernels", kept_in, TRITON_VARIABLE)


def _say(what: str, where: Path, variable: str) -> None:
    warnings.warn(
        f"the home directory cannot be written, so {what} in {where}. Set {variable} to choose another directory.",
        stacklevel=3,
    )


def _numbas_own_places() -> Iterator[Path]:
    if given := os.environ.get(VARIABLE):
        yield Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~"))
    if home.is_absolute():  # without a home, "~" stays, and numba would make a directory of that name
        yield home / "numba"


def _fallbacks() -> Iterator[Path]:
    package = Path(__file__).parent / "__pycache__"
    if _can_be_made(package):
        yield package
    with suppress(OSError):
        yield _private_temporary_directory("numba")


def _can_be_made(directory: Path) -> bool:
    """Whether files can be written in `directory`, or it can be made."""
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _private_temporary_directory(compiler: str) -> Path:
    """This user's directory for compiled code. Raises: OSError if others can write it: they could put code there."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    place = Path(tempfile.gettempdir()) / f"monosem-{compiler}-{user}"
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != user):
        raise PermissionError(f"{place} belongs to another user.")
    place.chmod(0o700)
    return place
