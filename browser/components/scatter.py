"""A map of all features on one canvas, fast for 131,072 points."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from browser.components.base import declare, on_trigger

_scatter = declare("scatter")


@dataclass(frozen=True)
class Name:
    """A text on the map."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Scale:
    """The legend of the colours: a title and the values at both ends."""

    title: str
    low: str
    high: str


def draw_scatter(
    xy: np.ndarray,
    colour: np.ndarray,
    faint: np.ndarray,
    *,
    scale: Scale,
    notes: Sequence[tuple[str, Sequence[str]]],
    names: Sequence[Name],
    chosen: int,
    height: int,
    key: str,
    on_open: Callable[[int], Any],
) -> None:
    """Draws points `xy` [n, 2] coloured by `colour` [n] in 0 … 1 (nan: grey), some `faint`; a click calls `on_open`.

    `notes` are the lines of the tip: (name, one text per point).
    """
    data = {
        "xy": _packed(xy, "<f4"),
        "colour": _packed(colour, "<f4"),
        "faint": _packed(faint, "u1"),
        "notes": [[name, list(texts)] for name, texts in notes],
        "names": [vars(name) for name in names],
        "scale": vars(scale),
        "chosen": chosen,
        "height": height,
    }
    _scatter(data=data, key=key, on_open_change=on_trigger(key, "open", on_open))


def _packed(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode()
