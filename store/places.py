"""Where an activation store is, and who may write to it: a directory here, objects behind a URL in `store.remote`.

A place holds keys (relative paths with `/`). A write is whole and durable, or has no effect.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from store.common import (
    PARTIAL_SUFFIX,
    StoreError,
    atomic_write,
    exclusive_lock,
    explaining_full_disk,
    fsync,
    write_bytes,
)

CREATION_WAIT_S = 60.0  # workers that start together create the store one after another
Check = Callable[[int], None]  # raises StoreError if another worker has taken the lane over


class Place(Protocol):
    """What an activation store needs of a file system or an object store."""

    @property
    def path(self) -> Path | str:
        """The directory or URL, as its user wrote it."""
        ...

    def where(self, key: str) -> str:
        """The full path or URL of a key, for messages."""
        ...

    def read(self, key: str) -> bytes:
        """The bytes of a key. Raises: StoreError if it does not exist or cannot be read."""
        ...

    def load(self, key: str) -> np.ndarray:
        """The bytes of a key as a writable uint8 array. Raises: OSError or one of `errors`."""
        ...

    def read_all(self, prefix: str) -> dict[str, bytes]:
        """The bytes of each `.json` key directly under `prefix`, in ascending order of keys."""
        ...

    def size(self, key: str) -> int | None:
        """The size of a key in bytes; None if it does not exist."""
        ...

    def sizes(self) -> dict[str, int]:
        """The size of every key in bytes, in one listing."""
        ...

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What `load` may raise besides OSError."""
        ...

    def write(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """Writes a key whole and durably. Without `replace` it must not exist with other bytes."""
        ...

    def write_chunk(self, key: str, data: bytes) -> None:
        """Writes one file of an array whole and durably, and replaces an existing one."""
        ...

    def delete(self, *keys: str) -> None:
        """Removes keys durably; a missing key is no error."""
        ...

    def leftovers(self) -> list[str]:
        """Keys of unfinished files that a killed writer left behind."""
        ...

    def create(self, files: Mapping[str, bytes], directories: Iterable[str]) -> None:
        """Creates a store of these files unless one exists; a reader sees none of them or all."""
        ...

    def is_vacant(self) -> bool:
        """Whether a store can be created here: nothing else is in the way."""
        ...

    def owned(self, lanes: Iterable[int], *, take_over: bool) -> contextlib.AbstractContextManager[Check]:
        """Makes the caller the only writer of these lanes. Raises: StoreError naming another writer of one of them."""
        ...


class LocalPlace:
    """A directory. A lane is owned by holding a kernel lock (flock), which ends with its process."""

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
            with contextlib.suppress(FileNotFoundError):  # its writer is just replacing it
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
        """As the protocol says; the lane's lock keeps other writers away, so `replace` makes no difference here."""
        with atomic_write(self.path / key) as partial:
            partial.write_bytes(data)

    def write_chunk(self, key: str, data: bytes) -> None:
        file = self.path / key
        write_bytes(file, data)
        for directory in file.parents[1:3]:  # the directories above the file's own may be new, too
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
        with exclusive_lock(self._sibling(".lock"), str(self.path), wait_s=CREATION_WAIT_S):
            if self.is_vacant():
                try:
                    with explaining_full_disk(self.path, lambda: "Nothing was written yet."):
                        self._build(files, directories)
                except BaseException:
                    shutil.rmtree(self._sibling(".creating"), ignore_errors=True)
                    raise

    def _build(self, files: Mapping[str, bytes], directories: Iterable[str]) -> None:
        """Builds the store under another name and renames it: after a kill before that, there is no store."""
        draft = self._sibling(".creating")
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
        """As the protocol says; `take_over` makes no difference here, since the locks of a dead process are free."""
        folder = self._sibling(".locks")
        with contextlib.ExitStack() as held:
            for lane in lanes:
                held.enter_context(exclusive_lock(folder / f"{lane:02d}", f"{self.path} (lane {lane})"))
            yield lambda lane: None
        with contextlib.suppress(OSError):  # another worker's locks are in it
            folder.rmdir()

    def _sibling(self, suffix: str) -> Path:
        return Path(os.path.realpath(self.path) + suffix)


def _files_under(directory: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Keys and sizes in bytes, without files that a writer removes in the meantime."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_under(entry.path, f"{prefix}{entry.name}/")
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield f"{prefix}{entry.name}", entry.stat().st_size
