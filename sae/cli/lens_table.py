"""The result of a lens as text: each measure with its controls beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sae.circuits.results import Measure, Result, Value

ROWS = 24  # of an array's first axis


def lens_table(result: Result) -> str:
    """Measures with their controls; of arrays indexed by feature, the first rows."""
    lines = [f"warning: {result.labels['warning']}", ""] if "warning" in result.labels else list[str]()
    for name, measure in result.measures.items():
        lines += [f"{name}: {measure.formula} (n = {measure.n:,} {measure.of})", *_rows(name, measure, result), ""]
    return "\n".join(lines)


def _rows(name: str, measure: Measure, result: Result) -> Iterator[str]:
    columns: dict[str, Value] = {"value": measure.value}
    columns |= {kind: control.value for kind, control in measure.controls.items()}
    if isinstance(measure.value, Tensor):
        for kind, value in columns.items():
            yield f"  {kind} by {', '.join(measure.axes)}"
            yield from _grid(name, value, measure, result)
    else:
        ends = "" if measure.ci95 is None else f"  [{', '.join(map(_number, measure.ci95))}]"
        for kind, value in columns.items():
            yield f"  {kind:24} {_number(value)}{ends if kind == 'value' else ''}"
    for kind, control in measure.controls.items():
        yield f"  {kind}: {control.what}"


def _grid(name: str, value: Value, measure: Measure, result: Result) -> Iterator[str]:
    if not isinstance(value, Tensor) or value.ndim == 0:
        yield f"    {_number(value)}"
        return
    axis, *rest = measure.axes
    rows = value.flatten(1) if value.ndim > 1 else value[:, None]
    labels = _labels(result, axis, name) or [f"{axis} {i}" for i in range(len(rows))]
    if rest and (columns := _labels(result, rest[-1], name)):
        yield f"    {'':28} " + " ".join(f"{str(column)[-9:]:>9}" for column in columns)
    for i in _shown(axis, measure):
        yield f"    {labels[i]!s:28} " + " ".join(f"{_number(x):>9}" for x in rows[i].tolist())
    if len(rows) > ROWS:
        yield f"    … {len(rows) - ROWS:,} more in the file"


def _shown(axis: str, measure: Measure) -> list[int]:
    """The first rows; of features and neurons, those with the largest values."""
    assert isinstance(measure.value, Tensor)
    size = measure.value.flatten(1) if measure.value.ndim > 1 else measure.value[:, None]
    if axis not in ("feature", "neuron"):
        return list(range(min(ROWS, len(size))))
    order = size.nan_to_num(0.0).abs().amax(1).argsort(descending=True)[:ROWS]
    return [int(i) for i in order]


def _labels(result: Result, axis: str, measure: str) -> list[Any] | None:
    """The names along an axis: those of this measure, or those of all."""
    found: list[Any] | None = result.labels.get(f"{axis}.{measure}", result.labels.get(axis))
    return found


def _number(value: Value) -> str:
    return "–" if math.isnan(value) else f"{float(value):.4g}"
