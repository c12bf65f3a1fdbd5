"""Reading ahead: the next piece is made, or comes from the disk, while the caller works on this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Piece = TypeVar("Piece")


def read_ahead(read: Callable[[Item], Piece], items: Iterable[Item]) -> Iterator[Piece]:
    """`read(item)` for each item in order, one of them in a thread ahead of the caller."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as reader:
        coming: Future[Piece] | None = None
        for item in items:
            if coming is None:
                coming = reader.submit(read, item)
            else:
                piece, coming = coming.result(), reader.submit(read, item)
                yield piece
        if coming is not None:
            yield coming.result()
