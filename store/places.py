"""Where an activation store lies, and who may write there: a directory here, objects behind a URL in `store.remote`.

A place holds keys (relative paths with `/`). What it writes is whole and durable, or not there at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from store.common import PARTIAL_SUFFIX, StoreError, atomic_write, exclusive_lock, fsync, write_bytes

CREATION_WAIT_S = 60.0  # workers that start together make the store one after another
Check = Callable[[int], None]  # raises StoreError when a lane is no longer ours


class Place(Protocol):
    """The few things an activation store needs of a file system or an object store."""

    @property
    def path(self) -> Path | str:
        """As a person names it."""
        ...

    def where(self, key: str) -> str:
        """A key as messages name it."""
        ...

    def read(self, key: str) -> bytes:
        """The bytes under a key. Raises StoreError if there are none."""
        ...

    def load(self, key: str) -> np.ndarray:
        """The bytes under a key as uint8, to be written to if one likes. Raises OSError, or one of `errors`."""
        ...

    def read_all(self, prefix: str) -> dict[str, bytes]:
        """Every `.json` key directly under `prefix`, ascending."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes under a key; None if there is no such key."""
        ...

    def sizes(self) -> dict[str, int]:
        """Every key with its bytes, in one listing."""
        ...

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What `load` may raise besides OSError."""
        ...

    def write(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """Writes a key whole and for good; without `replace` it must not be there with other bytes."""
        ...

    def write_chunk(self, key: str, data: bytes) -> None:
        """Writes one file of an array whole and for good, in place of any that is there."""
        ...

    def delete(self, *keys: str) -> None:
        """Removes keys for good; one that is not there is no error."""
        ...

    def leftovers(self) -> list[str]:
        """Keys that a killed writer left half-written."""
        ...

    def create(self, files: Mapping[str, bytes], directories: Iterable[str]) -> None:
        """Makes a store of these files unless one is there: all of them at once, as far as a reader can tell."""
        ...

    def is_vacant(self) -> bool:
        """Whether a store may be made here."""
        ...

    def owned(self, lanes: Iterable[int], *, take_over: bool) -> contextlib.AbstractContextManager[Check]:
        """Be the one writer of these lanes. Raises StoreError naming who writes one of them already."""
        ...


class LocalPlace:
    """A directory. Owners of lanes are held by the kernel's locks, which go with their process."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.errors: tuple[type[Exception], ...] = ()

    def where(self, key: str) -> str:
        return str(self.path / key)

    def read(self, key: str) -> bytes:
        try:
            return (self.path / key).read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"{self.path / key}: no such file") from error
        except OSError as error:
            raise StoreError(f"{self.path / key}: cannot be read ({error})") from error

    def load(self, key: str) -> np.ndarray:
        return np.fromfile(self.path / key, np.uint8)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        found = {}
        for file in sorted((self.path / prefix).glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # replaced by its writer
                found[file.relative_to(self.path).as_posix()] = file.read_bytes()
        return found

    def size(self, key: str) -> int | None:
        try:
            return (self.path / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self) -> dict[str, int]:
        return dict(_files_under(str(self.path), ""))

    def write(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """The lane's lock already keeps other writers away, so `replace` changes nothing here."""
        with atomic_write(self.path / key) as partial:
            partial.write_bytes(data)

    def write_chunk(self, key: str, data: bytes) -> None:
        file = self.path / key
        write_bytes(file, data)
        for directory in file.parents[1:3]:  # those above may be as new as the file's own
            fsync(directory)

    def delete(self, *keys: str) -> None:
        changed = set()
        for file in (self.path / key for key in keys):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
                changed.add(file.parent)
        for directory in changed:
            fsync(directory)

    def leftovers(self) -> list[str]:
        return [key for key in self.sizes() if key.endswith(PARTIAL_SUFFIX)]

    def create(self, files: Mapping[str, bytes], directories: Iterable[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self._beside(".lock"), str(self.path), wait_s=CREATION_WAIT_S):
            if self.is_vacant():
                self._build(files, directories)

    def _build(self, files: Mapping[str, bytes], directories: Iterable[str]) -> None:
        """Beside its place, then renamed there: killed before, the store does not exist."""
        draft = self._beside(".creating")
        if draft.exists():
            shutil.rmtree(draft)
        for name in directories:
            (draft / name).mkdir(parents=True)
        for name, content in files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(content)
        for entry in [*draft.rglob("*"), draft]:
            fsync(entry)
        target = Path(os.path.realpath(self.path))
        os.rename(draft, target)
        fsync(target.parent)

    def is_vacant(self) -> bool:
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    @contextlib.contextmanager
    def owned(self, lanes: Iterable[int], *, take_over: bool = False) -> Iterator[Check]:
        """`take_over` changes nothing here: a dead process holds no lock, a living one keeps its own."""
        folder = self._beside(".locks")
        with contextlib.ExitStack() as held:
            for lane in lanes:
                held.enter_context(exclusive_lock(folder / f"{lane:02d}", f"{self.path} (lane {lane})"))
            yield lambda lane: None
        with contextlib.suppress(OSError):  # another worker's locks are in it
            folder.rmdir()

    def _beside(self, suffix: str) -> Path:
        return Path(os.path.realpath(self.path) + suffix)


def _files_under(directory: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Keys and bytes; what a writer removes meanwhile is left out."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_under(entry.path, f"{prefix}{entry.name}/")
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield f"{prefix}{entry.name}", entry.stat().st_size
