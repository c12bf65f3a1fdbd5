"""Compressed text files, opened for reading their content."""

from __future__ import annotations

import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


class _ZstdFrames(io.RawIOBase):
    """The content of all frames of a .zst file; unlike the library's reader it notices a truncated last frame."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file, self._library = file, zstandard
        self._frame: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._packed or self._file.read(1 << 16)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._unpacked = memoryview(self._frame.decompress(packed))
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        taken = self._unpacked[: len(buffer)]
        buffer[: len(taken)] = taken
        self._unpacked = self._unpacked[len(taken) :]
        return len(taken)


@contextmanager
def _opened_zstd(path: Path, _mode: str) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        yield io.BufferedReader(_ZstdFrames(file))


COMPRESSION: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".zst": _opened_zstd}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's content as bytes, decompressed if its suffix says that it is compressed."""
    with COMPRESSION.get(path.suffix.lower(), open)(path, "rb") as stream:
        yield stream
