"""Reading ahead: the next piece is made, or comes from the disk, while the caller works on this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Piece = TypeVar("Piece")


def read_ahead(read: Callable[[Item], Piece], items: Iterable[Item], *, pieces: int = 1) -> Iterator[Piece]:
    """`read(item)` for each item in order, in a thread that is up to `pieces` of them ahead of the caller."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as reader:
        coming: deque[Future[Piece]] = deque()
        try:
            for item in items:
                coming.append(reader.submit(read, item))
                if len(coming) > pieces:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:  # a caller that stops early waits for the piece being read, not for all
            for piece in coming:
                piece.cancel()
