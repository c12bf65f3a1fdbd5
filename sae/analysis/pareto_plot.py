"""The plot of a sweep: fidelity against sparsity, one line per recipe and size, and one for the layer's own units."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

FRONTIER_FORMAT = 1
WIDTH, HEIGHT, MARGIN = 420, 300, 56
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
GREY = "#777"
UNITS_LINE = f'fill="none" stroke="{GREY}" stroke-width="1.5" stroke-dasharray="5 3"'
PANELS = (("ce_loss_score_zero", "CE recovered (zero ablation)"), ("fvu", "FVU"))


def picture(frontier: dict[str, Any]) -> str:
    """An SVG of CE recovered and of FVU over L0 (logarithmic): one point per run, one line per recipe and size.

    A dashed line shows the k largest of the layer's own units: a dictionary below it is less faithful than they are.
    """
    runs = [run for run in frontier["runs"] if run["l0"] and run["l0"] > 0]
    series = list(dict.fromkeys((run["recipe"], run["d_sae"]) for run in runs))
    colour = {key: COLOURS[i % len(COLOURS)] for i, key in enumerate(series)}
    units = [each for each in frontier.get("units", []) if each["l0"]]
    parts = [_panel(runs, units, colour, metric, title, i * WIDTH) for i, (metric, title) in enumerate(PANELS)]
    for i, (recipe, d_sae) in enumerate(series):
        y = HEIGHT + 18 * (i + 1)
        parts.append(f'<circle cx="{MARGIN}" cy="{y - 4}" r="4" fill="{colour[recipe, d_sae]}"/>')
        parts.append(_text(MARGIN + 10, y, f"{recipe}, {d_sae:,} features"))
    if units:
        y = HEIGHT + 18 * (len(series) + 1)
        parts.append(f'<path d="M{MARGIN - 6},{y - 4}h12" {UNITS_LINE}/>')
        parts.append(_text(MARGIN + 10, y, "the k largest of the layer's own units"))
    rows = sorted({run["rows"] for run in runs})
    caption = f"{frontier['model']}, {frontier['hook_point']}; rows a run: {', '.join(f'{n:,}' for n in rows)}"
    height = HEIGHT + 18 * (len(series) + 2 + bool(units))
    parts.append(_text(MARGIN, height - 8, caption))
    size = f'width="{WIDTH * len(PANELS)}" height="{height}"'
    style = '<style>text{font:12px sans-serif;fill:#555}</style><rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{"".join(parts)}</svg>\n'


def _panel(
    runs: Sequence[dict[str, Any]],
    units: Sequence[dict[str, Any]],
    colour: dict[tuple[str, int], str],
    metric: str,
    title: str,
    left: int,
) -> str:
    shown = [run for run in runs if run[metric] is not None]
    if not shown:
        return _text(left + MARGIN, MARGIN, f"{title}: not measured")
    baseline = [each for each in units if each[metric] is not None]
    x_low, x_high = _span([log10(each["l0"]) for each in (*shown, *baseline)])
    y_low, y_high = _span([each[metric] for each in (*shown, *baseline)])

    def place(run: dict[str, Any]) -> tuple[float, float]:
        across = (log10(run["l0"]) - x_low) / (x_high - x_low)
        up = (run[metric] - y_low) / (y_high - y_low)
        return left + MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = [_text(left + MARGIN, MARGIN - 24, title), _text(left + WIDTH // 2 - 10, HEIGHT - 14, "L0")]
    parts += [
        _text(left + MARGIN, HEIGHT - 32, f"{10**x_low:.3g}"),
        _text(left + WIDTH - 70, HEIGHT - 32, f"{10**x_high:.3g}"),
    ]
    parts += [_text(left + 4, HEIGHT - MARGIN, f"{y_low:.3g}"), _text(left + 4, MARGIN + 8, f"{y_high:.3g}")]
    frame = f'x="{left + MARGIN}" y="{MARGIN}" width="{WIDTH - 2 * MARGIN}" height="{HEIGHT - 2 * MARGIN}"'
    parts.append(f'<rect {frame} fill="none" stroke="#ccc"/>')
    for key, fill in colour.items():
        mine = sorted((run for run in shown if (run["recipe"], run["d_sae"]) == key), key=lambda run: run["l0"])
        points = [place(run) for run in mine]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{fill}"/>')
        for run, (x, y) in zip(mine, points, strict=True):
            tip = escape(f"{run['id']}: L0 {run['l0']:.2f}, {metric} {run[metric]:.4f}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}"><title>{tip}</title></circle>')
    if baseline:
        points = [place(each) for each in baseline]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {UNITS_LINE}/>')
        for each, (x, y) in zip(baseline, points, strict=True):
            tip = f"the {each['k']:,} largest units: L0 {each['l0']:.2f}, {metric} {each[metric]:.4f}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{GREY}"><title>{escape(tip)}</title></circle>')
    return "".join(parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis, with a margin of 5% beyond the values."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(words)}</text>'
