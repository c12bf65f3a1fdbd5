"""What every component needs: its scripts, callbacks for what it sends, and a vocabulary that sends each text once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from browser.tokens import Piece

_HERE = Path(__file__).parent


def declare(name: str) -> Callable[..., Any]:
    """The component `name`, from name.js (after common.js) and name.css."""
    css = _HERE / f"{name}.css"
    script = "\n".join((_HERE / file).read_text(encoding="utf-8") for file in ("common.js", f"{name}.js"))
    return st.components.v2.component(
        f"monosem_{name}", css=css.read_text(encoding="utf-8") if css.is_file() else None, js=script
    )


def on_trigger(key: str, name: str, call: Callable[[Any], Any] | None) -> Callable[[], None]:
    """A callback for the component `key`: passes on what it sent as `name`, unless that is nothing."""

    def changed() -> None:
        value = getattr(st.session_state.get(key), name, None)
        if value is not None and call is not None:
            call(value)

    return changed


@dataclass
class Vocabulary:
    """The distinct (token id, pieces) of a payload."""

    entries: list[tuple[int, list[Piece]]] = field(default_factory=list)
    numbers: dict[tuple[int, tuple[Piece, ...]], int] = field(default_factory=dict)

    def add(self, token_id: int, shown: Sequence[Piece]) -> int:
        """The number of a token in `entries`, where it is added if it is new."""
        key = (token_id, tuple(shown))
        if key not in self.numbers:
            self.numbers[key] = len(self.entries)
            self.entries.append((token_id, list(shown)))
        return self.numbers[key]
