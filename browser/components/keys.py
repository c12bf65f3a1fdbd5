"""Keyboard shortcuts that no button has: / for the search, ? for the list of all keys."""

from __future__ import annotations

from browser.components.base import declare

_keys = declare("keys")
KEYS = [
    ("← →", "previous, next feature"),
    ("/", "search box of this page, else the feature number"),
    ("↑ ↓", "previous, next token (Microscope, Attention)"),
    ("?", "show these keys"),
    ("Esc", "close this list, leave a box"),
]


def draw_keys() -> None:
    """Listens for / and ?; draws nothing until ? is pressed."""
    _keys(data={"keys": KEYS}, key="keys")
