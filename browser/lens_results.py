"""Results of `sae lens` for the pages: JSON files with their arrays beside them; no Streamlit, no model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file

from browser.data import SaeEntry
from store.common import same_model

FORMAT = 1
DIRECTORY = "lenses"  # beside a dictionary, and of models below the root


FEATURE = re.compile(r"(?:L\d{1,4}\.)?feature\.(\d{1,9})")
HEAD = re.compile(r"L(\d{1,4})\.head\.(\d{1,4})(?:\.[qkvz])?")


class LensFileError(ValueError):
    """A file that is not the result of a lens, or whose arrays are missing."""


@dataclass(frozen=True)
class Figure:
    """A number or an array, with its 95% interval where it has one."""

    value: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    what: str = ""


@dataclass(frozen=True)
class Measured:
    """One measure of a result, with its controls by name."""

    name: str
    figure: Figure
    n: int
    of: str
    formula: str
    axes: tuple[str, ...]
    controls: Mapping[str, Figure]


@dataclass(frozen=True)
class LensResult:
    """What one lens found."""

    path: Path
    lens: str
    about: Mapping[str, Any]
    labels: Mapping[str, Any]
    measures: Mapping[str, Measured]
    arrays: Mapping[str, np.ndarray]  # those that are no measures

    def names(self, axis: str, measure: str, size: int) -> list[str]:
        """The names along an axis of a measure."""
        found = self.labels.get(f"{axis}.{measure}", self.labels.get(axis))
        named = isinstance(found, list) and len(found) == size
        return [str(each) for each in found] if named else [f"{axis} {i}" for i in range(size)]


def find(entry: SaeEntry, root: Path) -> dict[str, Path]:
    """The results about a dictionary, and those about its model in `ROOT/lenses/<model>/`, by file name.

    Results about another model of that name are left out.
    """
    model = entry.config.get("model") or {}
    places = [root / DIRECTORY / Path(str(model.get("id", "?"))).name, entry.path / DIRECTORY]
    found = {}
    for place in places:
        for path in sorted(place.glob("*.json")):
            if same_model(_about(path).get("model") or {}, model):
                found[path.stem] = path
    return found


def feature_named(name: str) -> int | None:
    """The number of the feature that a part or site is named after, such as `feature.17` or `L0.feature.17`."""
    found = FEATURE.fullmatch(name)
    return int(found[1]) if found else None


def head_named(name: str) -> tuple[int, int] | None:
    """Layer and head that a part or site is named after, such as `L1.head.0` or, its keys, `L1.head.0.k`."""
    found = HEAD.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def erasures(entry: SaeEntry) -> dict[str, Path]:
    """The results of `sae lens erase` on the dictionary itself, by the concept as `erase:CONCEPT` writes it."""
    found = find(entry, entry.path)
    own = {name: path for name, path in found.items() if path.parent == entry.path / DIRECTORY}
    return {name.removeprefix("erase-"): path for name, path in own.items() if name.startswith("erase-")}


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))["about"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return about if isinstance(about, dict) else {}


def read(path: Path) -> LensResult:
    """A result. Raises: LensFileError for another file or format, or missing arrays."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise LensFileError(f"{path.name} has format {content['format']}; this version reads {FORMAT}.")
        arrays = load_file(path.with_suffix(".safetensors")) if "arrays_sha256" in content else {}
        measures = {name: _measured(name, each, arrays) for name, each in content["measures"].items()}
        kept = {str(name): arrays[name] for name in content["arrays"]}
        return LensResult(path, str(content["lens"]), content["about"], content["labels"], measures, kept)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise LensFileError(f"{path.name} cannot be read ({error}). Run `sae lens` again to write it anew.") from error


def _measured(name: str, found: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Measured:
    def value(stored: Any) -> np.ndarray:
        if isinstance(stored, dict):
            return np.asarray(arrays[stored["array"]], dtype=float)
        return np.asarray(math.nan if stored is None else float(stored))

    def figure(each: Mapping[str, Any]) -> Figure:
        low, high = (None, None) if each["ci95"] is None else map(value, each["ci95"])
        return Figure(value(each["value"]), low, high, str(each.get("what", "")))

    controls = {kind: figure(each) for kind, each in found["controls"].items()}
    axes = tuple(map(str, found["axes"]))
    return Measured(name, figure(found), int(found["n"]), str(found["of"]), str(found["formula"]), axes, controls)


def table(result: LensResult, name: str) -> pd.DataFrame:
    """A measure as rows: the names along its axes, value, low, high, and a column for each control."""
    measure = result.measures[name]
    shape = measure.figure.value.shape
    columns: dict[str, Any] = {}
    for place, axis in enumerate(measure.axes):
        names = result.names(axis, name, shape[place])
        columns[axis] = [names[index[place]] for index in np.ndindex(shape)]
    columns["value"] = measure.figure.value.flatten()
    if measure.figure.low is not None and measure.figure.high is not None:
        columns |= {"low": measure.figure.low.flatten(), "high": measure.figure.high.flatten()}
    for kind, control in measure.controls.items():
        columns[kind] = np.broadcast_to(control.value, shape).flatten()
    return pd.DataFrame(columns)


def by_head(result: LensResult) -> pd.DataFrame:
    """One row per head, one column per measure that has a value for each head."""
    rows: pd.DataFrame | None = None
    for name, measure in result.measures.items():
        if measure.axes == ("layer", "head"):
            shape = measure.figure.value.shape
            names = [f"L{layer}.head.{head}" for layer, head in np.ndindex(shape)]
            rows = pd.DataFrame({"head": names}) if rows is None else rows
            rows[name] = measure.figure.value.flatten()
    return pd.DataFrame({"head": []}) if rows is None else rows
