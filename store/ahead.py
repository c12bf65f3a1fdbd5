"""Reading ahead: the next piece comes from the disk while the caller works on this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Piece = TypeVar("Piece")


def read_ahead(read: Callable[[Item], Piece], items: Iterable[Item]) -> Iterator[Piece]:
    """`read(item)` for each item in order, one of them in a thread ahead of the caller."""
    with ThreadPoolExecutor(1, thread_name_prefix="shards") as reader:
        coming: Future[Piece] | None = None
        for item in items:
            present, coming = coming, reader.submit(read, item)
            if present:
                yield present.result()
        if coming:
            yield coming.result()
