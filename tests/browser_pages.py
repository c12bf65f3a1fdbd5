"""Reads the content of a page that AppTest has run."""

from __future__ import annotations

import json
from typing import Any

from streamlit.testing.v1 import AppTest


def html(page: AppTest) -> str:
    return "\n".join(element.value for element in page.html)


def payloads(block: Any) -> list[dict[str, Any]]:
    """What every component below `block` was sent."""
    found = []
    for child in getattr(block, "children", {}).values():
        if getattr(child, "type", "") == "bidi_component":
            found.append(json.loads(child.proto.json))
        found += payloads(child)
    return found
