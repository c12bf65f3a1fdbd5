"""Tokens down, features or heads across: a heat map beside the text, with a bar for each number a token has."""

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
    """One number for each token; not a number is drawn as none."""

    title: str
    values: np.ndarray
    help: str = ""


@dataclass(frozen=True)
class Column:
    """One column of cells: `open` is the feature a click on its head opens."""

    title: str
    note: str = ""
    open: int | None = None


@dataclass(frozen=True)
class Cells:
    """Sparse cells (row, column, value); colour is the value's share of `largest`, one number for each column."""

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
) -> None:
    """Draws the table, its cells at least `floor` strong.

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
