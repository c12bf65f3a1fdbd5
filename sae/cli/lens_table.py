"""The result of a lens as text: each measure with its controls beside it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sae.circuits.results import Measure, Result, Value

ROWS = 24  # of an array's first axis


def lens_table(result: Result) -> str:
    """Measures with their controls; of arrays indexed by feature, the first rows."""
    lines = list[str]()
    for name, measure in result.measures.items():
        lines += [f"{name}: {measure.formula} (n = {measure.n:,} {measure.of})", *_rows(measure, result), ""]
    return "\n".join(lines)


def _rows(measure: Measure, result: Result) -> Iterator[str]:
    columns: dict[str, Value] = {"value": measure.value}
    columns |= {kind: control.value for kind, control in measure.controls.items()}
    if not isinstance(measure.value, Tensor):
        for name, value in columns.items():
            interval = (
                f"  [{_number(measure.ci95[0])}, {_number(measure.ci95[1])}]"
                if name == "value" and measure.ci95
                else ""
            )
            yield f"  {name:24} {_number(value)}{interval}"
    else:
        for name, value in columns.items():
            yield f"  {name} by {', '.join(measure.axes)}"
            yield from _grid(value, measure.axes, result)
    for kind, control in measure.controls.items():
        yield f"  {kind}: {control.what}"


def _grid(value: Value, axes: tuple[str, ...], result: Result) -> Iterator[str]:
    if not isinstance(value, Tensor):
        yield f"    {_number(value)}"
        return
    rows = value if value.ndim > 1 else value[:, None]
    labels = result.labels.get(axes[0]) or [f"{axes[0]} {i}" for i in range(len(rows))]
    for label, row in list(zip(labels, rows, strict=False))[:ROWS]:
        yield f"    {str(label):28} " + " ".join(f"{_number(x):>9}" for x in row.flatten().tolist())
    if len(rows) > ROWS:
        yield f"    … {len(rows) - ROWS:,} more in the file"


def _number(value: Value) -> str:
    return f"{float(value):.4g}"
