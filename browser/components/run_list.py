"""The runs below the root as a table of links: each opens in place, or in a new tab like any other link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from browser.components.base import declare, on_trigger

_run_list = declare("run_list")


@dataclass(frozen=True)
class Column:
    """A column's head; `number` aligns its cells to the right."""

    title: str
    help: str = ""
    number: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell: `sort` is what its column sorts by (None: last), `share` in [0, 1] draws a bar, `tone` (CSS) a badge."""

    text: str
    sort: float | str | None = None
    share: float | None = None
    tone: str = ""
    help: str = ""


@dataclass(frozen=True)
class Run:
    """One row: the first of its cells is the link to `href`."""

    id: str
    href: str
    cells: Sequence[Cell]


def draw_runs(
    columns: Sequence[Column], runs: Sequence[Run], *, key: str, on_open: Callable[[str], Any] | None
) -> None:
    """Draws the table. A click on a link calls `on_open` with the run's id; with None, it loads the link."""
    rows = [{"id": run.id, "href": run.href, "cells": [vars(cell) for cell in run.cells]} for run in runs]
    data = {"in_place": on_open is not None, "columns": [vars(column) for column in columns], "rows": rows}
    _run_list(data=data, key=key, on_open_change=on_trigger(key, "open", on_open))
