"""Keys beyond the buttons' own: the search of the page, and the list of all keys."""

from __future__ import annotations

from browser.components.base import declare

_keys = declare("keys")
KEYS = [
    ("← →", "previous, next feature"),
    ("/", "the search box of this page (or the feature\u2019s number)"),
    ("↑ ↓", "previous, next token in the microscope and in attention"),
    ("?", "these keys"),
    ("Esc", "close this, leave a box"),
]


def draw_keys() -> None:
    """Listens for / and ?; draws nothing until one is pressed."""
    _keys(data={"keys": KEYS}, key="keys")
