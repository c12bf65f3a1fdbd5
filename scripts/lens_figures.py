"""Copies results of `sae lens` into one JSON file of measurements, and prints their tables.

    sae lens heads attn-2l --text corpus.jsonl --out results/attn-2l
    python scripts/lens_figures.py results/attn-2l/heads.json --section heads-attn-2l --json lenses.json

A section holds every measure of a result with its interval, count, formula and controls; arrays are lists of numbers
of 4 digits, without those that have one row for each feature or neuron.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import figures
from torch import Tensor

from sae.circuits.results import Control, Interval, Measure, Result, Value, read_result
from sae.cli.lens_table import lens_table

LONG_AXES = {"feature", "neuron"}


def plain(value: Value) -> Any:
    """Numbers of 4 digits, in lists where they are arrays; None for what is not finite."""
    if isinstance(value, Tensor):
        return [plain(each) if each.ndim else plain(float(each)) for each in value]
    return float(f"{value:.4g}") if math.isfinite(value) else None


def figures_of(result: Result) -> dict[str, Any]:
    """A result as JSON values, without its long arrays."""
    short = {name: each for name, each in result.measures.items() if not LONG_AXES & set(each.axes)}
    return {
        "lens": result.lens,
        "task": result.task,
        "about": dict(result.about),
        "labels": dict(result.labels),
        "measures": {name: _measure(each) for name, each in short.items()},
    }


def _measure(measure: Measure) -> dict[str, Any]:
    about = {"n": measure.n, "of": measure.of, "formula": measure.formula, "version": measure.version}
    controls = {name: {"what": each.what} | _numbers(each) for name, each in measure.controls.items()}
    return _numbers(measure) | about | {"axes": list(measure.axes), "controls": controls}


def _numbers(found: Measure | Control) -> dict[str, Any]:
    return {"value": plain(found.value)} | ({"ci95": _ends(found.ci95)} if found.ci95 else {})


def _ends(interval: Interval) -> list[Any]:
    return [plain(end) for end in interval]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON file that `sae lens` wrote")
    parser.add_argument("--section", required=True, help="name of its section in the file")
    parser.add_argument("--json", type=Path, help="file of measurements; other sections in it stay")
    args = parser.parse_args()
    result = read_result(args.result)
    print(lens_table(result))
    figures.record(args.json, args.section, figures_of(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
