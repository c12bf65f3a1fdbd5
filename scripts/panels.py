"""Lines and bars as panels of one SVG, for the pictures of the documentation, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 270, 44, 12, 24, 62
NAMES = 118  # room for the names of bars
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class Line(NamedTuple):
    """Points (x, y) with a name; controls are dashed."""

    name: str
    points: list[tuple[float, float]]
    control: bool = False


class Panel(NamedTuple):
    """Lines over one x axis, linear or by powers of 2; the y axis begins and ends at round numbers."""

    title: str
    x_axis: str
    lines: list[Line]
    powers_of_2: bool = False


class Bar(NamedTuple):
    """A bar; one that shows a control is dashed. `control` is a control's value for the same name, a dashed mark."""

    name: str
    value: float
    is_control: bool = False
    control: float | None = None


class Bars(NamedTuple):
    """Horizontal bars from 0, their names at the left; the axis begins and ends at round numbers."""

    title: str
    x_axis: str
    bars: list[Bar]


def drawing(panels: Sequence[Panel | Bars]) -> str:
    """An SVG with the panels side by side."""
    drawn = "".join(
        _bars(number, panel) if isinstance(panel, Bars) else _panel(number, panel)
        for number, panel in enumerate(panels)
    )
    names = max((len(panel.lines) for panel in panels if isinstance(panel, Panel)), default=0)
    height = HEIGHT + 13 * max(0, (names + 1) // 2 - 2)  # two names of lines a row; two rows always have room
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{height}" '
        f'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>{drawn}</svg>\n'
    )


def _panel(number: int, panel: Panel) -> str:
    xs = [x for line in panel.lines for x, _ in line.points]
    ys = [y for line in panel.lines for _, y in line.points]
    step = _round_step(max(ys) - min(ys))
    low, high = math.floor(min(ys) / step), math.ceil(max(ys) / step)
    left, right = number * WIDTH + LEFT, (number + 1) * WIDTH - RIGHT
    bottom = HEIGHT - BOTTOM

    def along(x: float) -> float:
        place: Callable[[float], float] = math.log2 if panel.powers_of_2 else float
        return left + (right - left) * (place(x) - place(min(xs))) / (place(max(xs)) - place(min(xs)))

    def up(y: float) -> float:
        return bottom - (bottom - TOP) * (y / step - low) / (high - low)

    parts = [f'<text x="{left}" y="14" font-weight="bold">{escape(panel.title)}</text>']
    for tick in range(low, high + 1):
        y = up(tick * step)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 3:.1f}" text-anchor="end">{tick * step:.3g}</text>')
    ticks = _spaced(sorted(set(xs))) if panel.powers_of_2 else [_round_step(max(xs)) * i for i in range(6)]
    for x in (tick for tick in ticks if min(xs) <= tick <= max(xs)):
        parts.append(f'<text x="{along(x):.1f}" y="{bottom + 13}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 27}" text-anchor="middle">{escape(panel.x_axis)}</text>')
    for place, line in enumerate(panel.lines):
        colour, dash = COLOURS[place % len(COLOURS)], ' stroke-dasharray="5 3"' if line.control else ""
        path = " ".join(f"{along(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        at = left + (right - left) * (place % 2) / 2
        below = bottom + 42 + 13 * (place // 2)
        parts.append(f'<text x="{at:.1f}" y="{below}" fill="{colour}">{escape(line.name)}</text>')
    return "".join(parts)


def _spaced(xs: list[float]) -> list[float]:
    """All of a few values, every second of many."""
    return xs if len(xs) <= 4 else xs[::2]


def _bars(number: int, panel: Bars) -> str:
    values = [0.0, *(value for bar in panel.bars for value in (bar.value, bar.control) if value is not None)]
    step = _round_step(max(values) - min(values))
    low, high = math.floor(min(values) / step), math.ceil(max(values) / step)
    left, right = number * WIDTH + NAMES, (number + 1) * WIDTH - 2 * RIGHT
    bottom, height = HEIGHT - BOTTOM, (HEIGHT - BOTTOM - TOP) / len(panel.bars)

    def along(x: float) -> float:
        return left + (right - left) * (x / step - low) / (high - low)

    parts = [f'<text x="{number * WIDTH + 8}" y="14" font-weight="bold">{escape(panel.title)}</text>']
    for tick in range(low, high + 1):
        x = along(tick * step)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13}" text-anchor="middle">{tick * step:.3g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 27}" text-anchor="middle">{escape(panel.x_axis)}</text>')
    for place, bar in enumerate(panel.bars):
        top, ends = TOP + height * (place + 0.15), sorted((along(0.0), along(bar.value)))
        paint = (
            f'fill="none" stroke="{COLOURS[1]}" stroke-dasharray="5 3"' if bar.is_control else f'fill="{COLOURS[0]}"'
        )
        parts.append(
            f'<text x="{left - 6}" y="{top + 0.35 * height + 3:.1f}" text-anchor="end">{escape(bar.name)}</text>'
        )
        parts.append(
            f'<rect x="{ends[0]:.1f}" y="{top:.1f}" width="{ends[1] - ends[0]:.1f}" '
            f'height="{0.7 * height:.1f}" {paint}/>'
        )
        if bar.control is not None:
            x, below = along(bar.control), top + 0.7 * height
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{below:.1f}" stroke="{COLOURS[1]}" '
                'stroke-width="2" stroke-dasharray="3 2"/>'
            )
    return "".join(parts)


def _round_step(size: float) -> float:
    """1, 2 or 5 times a power of 10, so that about five steps make the size."""
    power = 10.0 ** math.floor(math.log10(size / 5))
    return power * next(factor for factor in (1, 2, 5, 10) if 5 * factor * power >= size)
