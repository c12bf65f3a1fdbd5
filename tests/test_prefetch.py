"""Reading ahead: all items in order, never further ahead than requested, nothing after the caller has stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Queue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.common import read_ahead


@given(st.lists(st.integers(), max_size=12), st.integers(1, 5))
def test_every_piece_comes_once_and_in_order(items: list[int], pieces: int) -> None:
    assert list(read_ahead(lambda item: item * 2, items, pieces=pieces)) == [item * 2 for item in items]


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_reader_is_never_further_ahead_than_asked(pieces: int) -> None:
    """What can be read is what has been taken from `items`, which happens in the caller's own thread."""
    taken_from_items: list[int] = []
    begun: Queue[int] = Queue()

    def items() -> Iterator[int]:
        for item in range(20):
            taken_from_items.append(item)
            yield item

    def read(item: int) -> int:
        begun.put(item)
        return item

    found = read_ahead(read, items(), pieces=pieces)
    for number in range(5):
        assert next(found) == number
        assert taken_from_items == list(range(number + 1 + pieces))
    assert [begun.get(timeout=30) for _ in taken_from_items] == taken_from_items  # without another call
    assert begun.empty()


def test_a_caller_that_stops_early_waits_for_one_piece() -> None:
    begun, go = [], threading.Event()

    def read(item: int) -> int:
        begun.append(item)
        if item == 1:
            go.wait(30)
        return item

    found = read_ahead(read, range(9), pieces=4)
    assert next(found) == 0
    closing = threading.Timer(0.05, go.set)
    closing.start()
    found.close()
    assert begun in ([0], [0, 1])  # pieces 2, 3 and 4 were waiting, and are not read


def test_an_error_comes_where_its_piece_would() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise OSError("this piece is broken")
        return item

    found = read_ahead(read, range(9), pieces=3)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OSError, match="this piece is broken"):
        next(found)
