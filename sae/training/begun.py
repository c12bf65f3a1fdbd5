"""The run that a directory was begun with, and the defaults that recipes had when it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae.training.config import TrainConfig
from sae.training.recipes import DEFAULT_RECIPE, Recipe, resolve

SETTINGS = "train.json"  # the settings of the run that a directory holds
SINCE_0_1 = "calibrate_threshold"  # recorded by every run since version 0.1
# What recipes set since, and did not set or set otherwise then.
DEFAULTS_OF_0_1: dict[str, dict[str, Any]] = {
    "batch-topk": {"calibrate_threshold": False},
    "balanced": {"calibrate_threshold": False},
    "matryoshka": {"lr": 1e-3, "batch_tokens": 4096, "calibrate_threshold": False, "min_density": 0.0},
    "jumprelu": {"min_density": 0.0},
}


def begun_with(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`; {} if it holds none, or they are damaged, which `claim` says."""
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8")).get("train")
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def recipe_in(out: Path) -> str:
    """The recipe of the run in `out`; for a new one, the default."""
    return str(begun_with(out).get("recipe", DEFAULT_RECIPE))


def resolve_in(out: Path, name: str, **overrides: Any) -> tuple[Recipe, TrainConfig]:
    """`resolve` for a run in `out`: one begun by version 0.1 keeps the defaults that its recipe had then."""
    begun = begun_with(out)
    defaults = DEFAULTS_OF_0_1.get(name, {}) if begun and SINCE_0_1 not in begun else {}
    return resolve(name, **(defaults | overrides))
