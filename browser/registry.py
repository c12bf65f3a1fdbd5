"""The views of the app, one line each, in the order of the bar; the name is what `?view=` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from browser.state import Page
from browser.views import feature, features, run, steering


@dataclass(frozen=True)
class View:
    """`show` draws the page; without `needs_index` it is drawn for a dictionary that has no index too."""

    title: str
    show: Callable[[Page], None]
    needs_index: bool = True


VIEWS = {
    "run": View("Run", run.show, needs_index=False),
    "features": View("Features", features.show),
    "feature": View("Feature", feature.show),
    "steering": View("Steering", steering.show),
}
DEFAULT = "features"
