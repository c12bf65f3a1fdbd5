"""The drawings of the documentation show the measurements that are recorded beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from lens_plot import DRAWINGS  # noqa: E402
from panels import Bar, Bars, Line, Panel, drawing  # noqa: E402

MEASUREMENTS = ROOT / "docs/measurements"
SVG = "{http://www.w3.org/2000/svg}"


def points(svg: str) -> list[np.ndarray]:
    """Of each line its points, in pixels."""
    lines = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [np.array([pair.split(",") for pair in line.attrib["points"].split()], dtype=float) for line in lines]


@pytest.mark.parametrize("powers_of_2", [False, True])
def test_points_lie_where_the_axes_say(powers_of_2: bool) -> None:
    """Numbers beside the axes and the points of a line give the same scale."""
    data = [(1.0, -0.2), (4.0, 0.31), (16.0, 0.9)]
    panel = Panel("a < b", "n", [Line("seen", data), Line("control", [(x, 0.0) for x, _ in data], True)], powers_of_2)
    svg = drawing([panel])
    drawn, control = points(svg)
    texts = [each for each in ElementTree.fromstring(svg).iter(f"{SVG}text") if each.get("text-anchor") == "end"]
    labels = {each.text: float(each.attrib["y"]) - 3 for each in texts}  # those of the y axis
    zero, top = labels["0"], labels["1"]
    assert [(zero - y) / (zero - top) for y in drawn[:, 1]] == pytest.approx([y for _, y in data], abs=2e-3)
    assert control[:, 1] == pytest.approx([zero] * 3, abs=0.2)
    shares = (drawn[:, 0] - drawn[0, 0]) / (drawn[-1, 0] - drawn[0, 0])
    assert shares[1] == pytest.approx(0.5 if powers_of_2 else 0.2, abs=2e-3)


def test_bars_are_as_long_as_the_axis_says() -> None:
    rows = [Bar("a < b", 0.31), Bar("random", -0.2, True), Bar("with a control", 0.9, control=0.5)]
    svg = ElementTree.fromstring(drawing([Bars("a < b", "share", rows)]))
    axis = [each for each in svg.iter(f"{SVG}text") if each.get("text-anchor") == "middle" and each.text != "share"]
    at = {each.text: float(each.attrib["x"]) for each in axis}
    (zero, first), (one, last) = sorted((float(x), place) for x, place in at.items())[0 :: len(at) - 1]
    unit = (last - first) / (one - zero)
    zero = first - zero * unit
    drawn = [each for each in svg.iter(f"{SVG}rect") if "x" in each.attrib]
    ends = [(float(each.attrib["x"]), float(each.attrib["width"])) for each in drawn]
    assert ends[0] == pytest.approx((zero, 0.31 * unit), abs=0.2)
    assert ends[1] == pytest.approx((zero - 0.2 * unit, 0.2 * unit), abs=0.2)
    assert ["stroke-dasharray" in each.attrib for each in drawn] == [False, True, False]
    (mark,) = (each for each in svg.iter(f"{SVG}line") if "stroke-dasharray" in each.attrib)
    assert float(mark.attrib["x1"]) == pytest.approx(zero + 0.5 * unit, abs=0.2)


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_drawings_are_of_the_recorded_measurements(name: str) -> None:
    """`python scripts/lens_plot.py docs/measurements/lenses.json --out docs/measurements` was run after the last."""
    sections = json.loads((MEASUREMENTS / "lenses.json").read_text(encoding="utf-8"))
    assert (MEASUREMENTS / name).read_text(encoding="utf-8") == drawing(DRAWINGS[name](sections))
