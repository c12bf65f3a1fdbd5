"""Draws a few lines on logarithmic axes as an SVG, without a plotting library."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT, MARGIN = 300, 240, 46
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

Points = list[tuple[float, float]]


def line_plot(panels: list[tuple[str, dict[str, Points]]]) -> str:
    """An SVG with one panel per entry (title, {name of a line: its points}). Numbers are positive; panels share y."""
    everything = [y for _, lines in panels for points in lines.values() for _, y in points]
    low, high = 10 ** math.floor(math.log10(min(everything))), 10 ** math.ceil(math.log10(max(everything)))
    drawn = [_panel(n, *panel, low, high) for n, panel in enumerate(panels)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(drawn)}</svg>\n"
    )


def _panel(n: int, title: str, lines: dict[str, Points], low: float, high: float) -> str:
    xs = sorted({x for points in lines.values() for x, _ in points})
    left, right, top, bottom = n * WIDTH + MARGIN, (n + 1) * WIDTH - 18, 24, HEIGHT - 30

    def at_x(x: float) -> float:
        return left + (right - left) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])

    def at_y(y: float) -> float:
        return bottom - (bottom - top) * math.log(y / low) / math.log(high / low)

    parts = [f'<text x="{left}" y="14">{escape(title)}</text>']
    for x in xs:
        parts.append(f'<text x="{at_x(x):.1f}" y="{bottom + 14}" text-anchor="middle">{x:g}</text>')
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = at_y(10.0**power)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 3:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 4}" y="{top + 12 * (number + 1)}" fill="{colour}">{escape(name)}</text>')
    return "".join(parts)
