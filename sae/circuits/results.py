"""What a lens measured, as files: every measure with its interval, count, formula, version and controls.

A measure without controls is not written, because alone it says nothing: random weights and random directions give
high scores, too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.jobs.checkpoint import read_tensors, write_tensors
from store.common import write_json

FORMAT = 1
DIRECTORY = "lenses"
ARRAY = "array"  # in the JSON file: the name of a value in the safetensors file
NAME = re.compile(r"[\w-]+(\.[\w-]+)*")

Value = float | Tensor
Interval = tuple[Value, Value]


class ResultError(ValueError):
    """A result that cannot be written or read."""


@dataclass(frozen=True)
class Control:
    """What a measure must be compared with: the same formula where the effect is destroyed; `what` says how."""

    value: Value
    what: str
    ci95: Interval | None = None


@dataclass(frozen=True)
class Measure:
    """One measured quantity: a number, or an array whose `axes` are named, such as ("layer", "head").

    `n` counts what `value` averages over, and `of` names it (prompts, tokens). `ci95` is (low, high), of the shape of
    `value`; None where `value` is exact, such as a function of the weights. `version` counts changes of `formula`.
    """

    value: Value
    n: int
    of: str
    formula: str
    controls: Mapping[str, Control]
    ci95: Interval | None = None
    axes: tuple[str, ...] = ()
    version: int = 1


@dataclass(frozen=True)
class Result:
    """What one lens found about a model or a dictionary.

    `about` says on what: the identity of the model, the hook point, the text, the seed. `labels` are JSON values for a
    reader, such as the names along an axis. Arrays that are no measures are in `arrays`, indexed by feature where they
    have features.
    """

    lens: str
    measures: Mapping[str, Measure]
    about: Mapping[str, Any]
    task: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """`<lens>.json` or `<lens>-<task>.json`."""
        return f"{self.lens}{f'-{self.task}' if self.task else ''}.json"


def write_result(result: Result, directory: str | Path) -> Path:
    """Writes `<directory>/<lens>[-<task>].json` and, with arrays, a `.safetensors` file beside it; returns the first.

    Both are written whole or not at all, the JSON file last: where it is, the arrays it names are there, too.
    Raises: ResultError for a measure without controls, without a count or of mismatched shape.
    """
    path = Path(directory) / result.file_name
    if not NAME.fullmatch(result.file_name):
        raise ResultError(f"{result.file_name!r} cannot name a file; lens and task are letters, digits, _ and -.")
    arrays = {name: tensor.detach().contiguous() for name, tensor in result.arrays.items()}
    measures = {name: _described(name, measure, arrays) for name, measure in result.measures.items()}
    content: dict[str, Any] = {
        "format": FORMAT,
        "lens": result.lens,
        "task": result.task,
        "about": dict(result.about),
        "measures": measures,
        "labels": dict(result.labels),
        "arrays": sorted(result.arrays),
    }
    beside = path.with_suffix(".safetensors")
    if arrays:
        content["arrays_sha256"] = _sha256(arrays)
        write_tensors(beside, arrays, {"lens": result.lens, "format": FORMAT, "sha256": content["arrays_sha256"]})
    write_json(path, content)
    if not arrays:
        beside.unlink(missing_ok=True)  # of an earlier result
    return path


def read_result(path: str | Path) -> Result:
    """What `write_result` wrote. Raises: ResultError for another file, CheckpointError if its arrays are missing."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(f"{path} is not the result of a lens ({error}). `sae lens` writes one.") from error
    if known != FORMAT:
        raise ResultError(f"{path} has format {known}, this version reads {FORMAT}. Use the version that wrote it.")
    measures = content["measures"]
    arrays: dict[str, Tensor] = {}
    if "arrays_sha256" in content:
        beside = path.with_suffix(".safetensors")
        arrays, header = read_tensors(beside)
        if header.get("sha256") != content["arrays_sha256"]:
            raise ResultError(f"{beside} does not belong to {path.name}: its run was stopped. Run `sae lens` again.")
    return Result(
        content["lens"],
        {name: _measure(measure, arrays) for name, measure in measures.items()},
        content["about"],
        content["task"],
        content["labels"],
        {name: arrays[name] for name in content["arrays"]},
    )


def results_in(directory: str | Path) -> dict[str, Path]:
    """The results in a directory: paths by name, `<lens>` or `<lens>-<task>`."""
    return {path.stem: path for path in sorted(Path(directory).glob("*.json"))}


def _described(name: str, measure: Measure, arrays: dict[str, Tensor]) -> dict[str, Any]:
    """A measure as JSON; arrays go to `arrays`."""
    if not NAME.fullmatch(name):
        raise ResultError(f"{name!r} cannot name a measure: letters, digits, _, - and dots between them.")
    if not measure.controls:
        raise ResultError(
            f"measure {name!r} has no controls, so it is not written. Measure the same formula where the effect is "
            "destroyed, such as on shuffled weights or a random direction of equal norm."
        )
    if measure.n < 1 or not measure.formula:
        raise ResultError(f"measure {name!r} needs a count of at least 1 and a formula; got n = {measure.n}.")
    shape = _shape(measure.value)
    if len(measure.axes) != len(shape):
        raise ResultError(f"measure {name!r} has shape {list(shape)} and axes {measure.axes}; name each axis.")

    def stored(value: Value, place: str) -> float | None | dict[str, str]:
        if isinstance(value, Tensor):
            arrays[place] = value.detach().contiguous().clone()  # measures may share a control
            return {ARRAY: place}
        return float(value) if math.isfinite(value) else None

    def interval(found: Interval | None, place: str) -> list[Any] | None:
        if found is None:
            return None
        if any(_shape(end) != shape for end in found):
            raise ResultError(f"measure {name!r} has shape {list(shape)}, its interval another one.")
        return [stored(end, f"{place}.{side}") for end, side in zip(found, ("low", "high"), strict=True)]

    def of_control(control: Control, place: str) -> dict[str, Any]:
        ends = None if control.ci95 is None else list(zip(control.ci95, ("low", "high"), strict=True))
        return {
            "value": stored(control.value, place),
            "ci95": None if ends is None else [stored(end, f"{place}.{side}") for end, side in ends],
            "what": control.what,
        }

    return {
        "value": stored(measure.value, name),
        "ci95": interval(measure.ci95, name),
        "n": measure.n,
        "of": measure.of,
        "formula": measure.formula,
        "version": measure.version,
        "axes": list(measure.axes),
        "controls": {kind: of_control(each, f"{name}.{kind}") for kind, each in measure.controls.items()},
    }


def _measure(found: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Measure:
    def value(stored: Any) -> Value:
        return arrays[stored[ARRAY]] if _is_array(stored) else math.nan if stored is None else float(stored)

    def interval(stored: Any) -> Interval | None:
        return None if stored is None else (value(stored[0]), value(stored[1]))

    controls = {
        kind: Control(value(each["value"]), each["what"], interval(each["ci95"]))
        for kind, each in found["controls"].items()
    }
    return Measure(
        value(found["value"]),
        found["n"],
        found["of"],
        found["formula"],
        controls,
        interval(found["ci95"]),
        tuple(found["axes"]),
        found["version"],
    )


def _sha256(arrays: Mapping[str, Tensor]) -> str:
    found = sha256()
    for name, tensor in sorted(arrays.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _is_array(stored: Any) -> bool:
    return isinstance(stored, dict) and ARRAY in stored


def _shape(value: Value) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size()
