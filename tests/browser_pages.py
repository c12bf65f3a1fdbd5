"""Reads the content of a page that AppTest has run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamlit.testing.v1 import AppTest

import browser

APP = Path(browser.__file__).with_name("app.py")


def run_page(**params: str) -> AppTest:
    """The app at an address with these parameters, run once without an exception."""
    page = AppTest.from_file(str(APP), default_timeout=60)
    for name, value in params.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception, page.exception
    return page


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
