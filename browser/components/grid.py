"""A heat map of tokens (rows) × features or heads (columns), with bars for other numbers of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from browser.components.base import Vocabulary, declare, on_trigger
from browser.tokens import Piece

_grid = declare("grid")


@dataclass(frozen=True)
class Bars:
    """One number per token; nan draws no bar."""

    title: str
    values: np.ndarray
    help: str = ""


@dataclass(frozen=True)
class Column:
    """One column of cells; a click on its head opens the feature `open`."""

    title: str
    note: str = ""
    open: int | None = None


@dataclass(frozen=True)
class Cells:
    """Sparse cells (row, column, value); the colour is |value| / `largest` of the column."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    largest: np.ndarray


def draw_grid(
    token_ids: Sequence[int],
    shown: Sequence[Sequence[Piece]],
    *,
    bars: Sequence[Bars],
    columns: Sequence[Column],
    cells: Cells,
    unit: str,
    selected: int | None,
    key: str,
    on_row: Callable[[int], Any] | None = None,
    on_column: Callable[[int], Any] | None = None,
    height: int = 560,
    floor: float = 0.12,
    tokens: bool = True,
) -> None:
    """Draws the table; every cell has at least the strength `floor`, so that it stays visible.

    `tokens`: whether the rows are the tokens of a text, in its order.
    A click on a token calls `on_row`, one on a column's head `on_column` with its feature.
    """
    vocabulary = Vocabulary()
    rows = [vocabulary.add(i, s) for i, s in zip(token_ids, shown, strict=True)]
    data = {
        "vocab": vocabulary.entries,
        "rows": rows,
        "selected": selected,
        "bars": [_bars(each) for each in bars],
        "columns": [vars(column) for column in columns],
        "cells": [
            [int(r), int(c), round(float(v), 5)]
            for r, c, v in zip(cells.rows, cells.columns, cells.values, strict=True)
        ],
        "max": [float(m) for m in cells.largest],
        "unit": unit,
        "floor": floor,
        "height": height,
        "tokens": tokens,
    }
    on_row_change, on_column_change = on_trigger(key, "row", on_row), on_trigger(key, "column", on_column)
    _grid(data=data, key=key, on_row_change=on_row_change, on_column_change=on_column_change)


def _bars(bars: Bars) -> dict[str, Any]:
    values = [None if not np.isfinite(v) else round(float(v), 5) for v in bars.values]
    return {
        "title": bars.title,
        "help": bars.help,
        "values": values,
        "max": max((abs(v) for v in values if v is not None), default=1.0) or 1.0,
    }
