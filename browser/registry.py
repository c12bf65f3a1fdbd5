"""The views of the app in the order of the bar; `?view=` names one by its title."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from browser.state import Page
from browser.views import attention, compare, feature, features, heads, map, microscope, patching, run, steering, token


@dataclass(frozen=True)
class View:
    """`show` draws the page. `needs_index`: only for indexed dictionaries. `needs_model`: only where the model can be
    run. `for_dumps`: also for imported feature pages, which are samples without weights."""

    title: str
    show: Callable[[Page], None]
    needs_index: bool = True
    for_dumps: bool = False
    needs_model: bool = False


VIEWS = {
    "run": View("Run", run.show, needs_index=False, for_dumps=True),
    "features": View("Features", features.show, for_dumps=True),
    "feature": View("Feature", feature.show, for_dumps=True),
    "microscope": View("Microscope", microscope.show, needs_model=True),
    "steering": View("Steering", steering.show, needs_model=True),
    "map": View("Map", map.show),
    "compare": View("Compare", compare.show, needs_index=False),
    "token": View("Token", token.show),
    "attention": View("Attention", attention.show, needs_model=True),
    "heads": View("Heads", heads.show, needs_index=False),
    "patching": View("Patching", patching.show, needs_index=False),
}
DEFAULT = "features"
