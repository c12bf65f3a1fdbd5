"""What every room may import from the store: lanes, splits, records, whole files, locks, reading ahead.

The standard library alone, so that the trainer can use it on a machine without zarr.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np

LANES = 64  # document i belongs to lane i % LANES, shard s of a split to lane s % LANES, for any number of workers
HELD_OUT, TRAIN = "heldout", "train"
SPLITS = (HELD_OUT, TRAIN)  # in the order of their shards in a store
# How contexts begin, as a store's provenance says under "bos".
BOS_BEFORE_DOCUMENTS = "one BOS before each document; BOS rows are stored and not kept"
BOS_BEFORE_CONTEXTS = "one BOS at the start of each context and before each document; BOS rows are stored and not kept"
ARRAYS = "arrays"  # kind of a recorded model whose activations came as arrays: it cannot be run here
PARTIAL_SUFFIX = ".partial"  # of unfinished files; version 0.1 let zarr write shards, with the same suffix

Item = TypeVar("Item")
Piece = TypeVar("Piece")


class StoreError(ValueError):
    """Something about a store that its user can fix: what, where, got, expected, what to do next."""


class DiskFull(StoreError):
    """There is no room on a disk, or a quota is used up."""


class DocumentRecord(NamedTuple):
    """What a store keeps of a document: its table entry, without the text."""

    id: str
    source: str
    domain: str
    sha256: str  # of the text


def contexts_begin_with_bos(provenance: Mapping[str, Any]) -> bool:
    """Whether every context of a store, or of a live run, begins with BOS, as its provenance says."""
    return bool(provenance.get("bos") == BOS_BEFORE_CONTEXTS)


def same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two recorded identities ({"id", "kind", "sha256"}) are of one model: the hash decides, not the path."""
    return bool(a.get("sha256")) and a["sha256"] == b.get("sha256")


def is_control_of(other: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether one config.json is of the control of a crosscoder's: the same run with its sites paired at random."""

    def run(of: Mapping[str, Any], *, shuffled: bool) -> tuple[object, ...]:
        sites = [{key: site.get(key) for key in ("hook_point", "model", "width")} for site in of.get("sites", [])]
        return sites, of.get("d_sae"), {**of.get("train", {}), "shuffle_sites": shuffled}

    shuffled = [bool(each.get("train", {}).get("shuffle_sites")) for each in (other, config)]
    return (
        bool(config.get("sites"))
        and shuffled == [True, False]
        and run(other, shuffled=True) == run(config, shuffled=True)
    )


@dataclass(frozen=True)
class RowFilter:
    """Which rows of kept tokens a dictionary leaves out of its training, its measurements and its edits.

    Left out are the first `skip_positions` positions of each context, the tokens `skip_token_ids`, and, at each hook
    point of `median_norms`, rows with ‖x‖ > `max_norm_multiple` · the median norm there (0: none). Where x̂ replaces x
    in the model, such rows stay as they are.
    """

    skip_positions: int = 0
    skip_token_ids: tuple[int, ...] = ()
    max_norm_multiple: float = 0.0
    median_norms: Mapping[str, float] = field(default_factory=dict)  # by hook point, of the training rows

    @property
    def max_norms(self) -> dict[str, float]:
        """The largest ‖x‖ that is let through, by hook point."""
        return {hook: self.max_norm_multiple * median for hook, median in self.median_norms.items()}

    @property
    def is_off(self) -> bool:
        """Whether it leaves no row out."""
        return not (self.skip_positions or self.skip_token_ids or self.max_norm_multiple)

    def keeps_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Which of the tokens [..., position] positions and token ids leave in: bool, same shape."""
        import numpy as np  # here, because this module is on the way to `sae --help`

        return (np.arange(tokens.shape[-1]) >= self.skip_positions) & ~np.isin(tokens, self.skip_token_ids)

    def to_json(self) -> dict[str, Any]:
        """The entry "row_filter" of config.json."""
        return {
            "skip_positions": self.skip_positions,
            "skip_token_ids": list(self.skip_token_ids),
            "max_norm_multiple": self.max_norm_multiple,
            "median_norms": dict(self.median_norms),
        }

    @classmethod
    def of_json(cls, recorded: Mapping[str, Any] | None) -> RowFilter:
        """The filter of a config.json; without an entry one that leaves no row out."""
        found = recorded or {}
        return cls(
            found.get("skip_positions", 0),
            tuple(found.get("skip_token_ids", ())),
            found.get("max_norm_multiple", 0.0),
            found.get("median_norms", {}),
        )


def can_run(model: Mapping[str, Any]) -> bool:
    """Whether a recorded identity is of a model that can be opened: not if its activations came as arrays."""
    return model.get("kind") != ARRAYS


# --- whole files -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path to write; on success it is flushed to disk and renamed to `path`, on an error removed.

    A reader sees either the old file or the new one, even after a kill or a loss of power. The directory
    must exist. Raises: DiskFull when there is no room; OSError naming `path` for another fault of the disk.
    """
    path = Path(path)
    # Two processes or threads that write the same file must not share a temporary one.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL_SUFFIX}")
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, DiskFull):  # of another file, and named already
            raise
        if reason := full_disk(error):
            raise DiskFull(
                f"{path} could not be written: {reason}. What was there before is unchanged; make room and repeat the "
                "command"
            ) from error
        number = _system_error(error)
        if number is not None and not getattr(error, "filename", None):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    fsync(path.parent)


def full_disk(error: BaseException) -> str | None:
    """What the system calls it if `error` says that there is no room to write; else None."""
    if isinstance(error, DiskFull):
        return (error.__cause__ and full_disk(error.__cause__)) or os.strerror(errno.ENOSPC)
    number = _system_error(error)
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def _system_error(error: BaseException) -> int | None:
    """The number of a system error; libraries written in Rust (safetensors, tokenizers) have it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return int(found[1]) if found else None


@contextlib.contextmanager
def explaining_full_disk(place: object, kept: Callable[[], str]) -> Iterator[None]:
    """A full disk inside raises DiskFull that names `place` and says what is `kept`, asked only then."""
    try:
        yield
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        message = f"{place} could not be written: {reason}. {kept()} Make room and repeat the command"
        raise DiskFull(message) from error


def reserve(path: str | os.PathLike[str]) -> None:
    """Allocates the disk blocks of a sparse file, where the system can; memory-mapped files are.

    Without it, a write into the map on a full disk would end the process (SIGBUS). Raises: OSError when there is no
    room.
    """
    size = os.path.getsize(path)
    if not size or not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system cannot
                raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all; makes its directory if necessary."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes JSON to `path` whole or not at all. Raises: ValueError for NaN and infinity, which JSON cannot hold."""
    write_bytes(path, json_bytes(content, indent=2))


def json_bytes(content: Any, *, indent: int) -> bytes:
    """A JSON file's bytes: keys sorted, so that equal objects give equal bytes. Raises: ValueError for NaN."""
    return (json.dumps(content, indent=indent, sort_keys=True, allow_nan=False) + "\n").encode()


def fsync(path: str | os.PathLike[str]) -> None:
    """Makes a file's bytes, or the names in a directory, survive a loss of power."""
    if os.name == "nt" and os.path.isdir(path):  # Windows cannot open a directory; it writes names by itself
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- one writer at a time --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive_lock(path: Path, what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds the lock file `path`, which is removed at the end.

    The kernel's lock (flock) ends with its process in any case, so a lock file that was left behind locks
    nothing. Raises: StoreError after `wait_s` seconds, saying which process is writing `what`.
    """
    deadline = time.monotonic() + wait_s
    while (handle := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise StoreError(
                f"{what} is being written by {_holder(path) or 'another process'}: "
                "wait for it to end, or stop it, then repeat the command"
            )
        time.sleep(0.02)
    try:
        with contextlib.suppress(OSError):  # the name is for messages; a full disk has no room for it
            os.ftruncate(handle, 0)
            os.write(handle, f"{writer_name()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)  # frees the lock


def _try_lock(path: Path) -> int | None:
    """An open, locked handle of the file that is at `path` now; None if another process holds the lock."""
    try:
        import fcntl  # Unix only, unlike the rest of this module
    except ImportError:
        raise StoreError(
            f"{path}: activation stores and feature indexes are written under file locks, which this system does not "
            "have. On Windows run monosem in WSL; dictionaries can be read, run and exported without it"
        ) from None
    while True:
        with contextlib.suppress(FileNotFoundError):  # its directory was removed in between: make it again
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    return handle
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # the previous holder removed this file between our two steps


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_bytes()[:200].decode("utf-8", "replace").strip()
    return ""


def writer_name() -> str:
    """This process as messages name it."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


# --- reading ahead ---------------------------------------------------------------------------------------------------


def read_ahead(read: Callable[[Item], Piece], items: Iterable[Item], *, pieces: int = 1) -> Iterator[Piece]:
    """`read(item)` for each item in order, in a thread that is up to `pieces` items ahead of the caller."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as reader:
        coming: deque[Future[Piece]] = deque()
        try:
            for item in items:
                coming.append(reader.submit(read, item))
                if len(coming) > pieces:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:  # a caller that stops early waits for the piece being read, not for all of them
            for piece in coming:
                piece.cancel()
