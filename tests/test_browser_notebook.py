"""Features shown in a notebook: hostile tokens stay text, unknown features are errors."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser_fixture import DENSE, HOSTILE, build_index

from browser.notebook import show


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_page_is_sandboxed_in_its_frame(tmp_path: Path) -> None:
    build_index(tmp_path / "features.zarr", d_sae=12, n_contexts=48)
    shown = show(tmp_path, HOSTILE, DENSE)
    outer, inner = Tags(), Tags()
    outer.feed(shown._repr_html_())
    ((tag, attributes),) = outer.found  # no token became a tag
    assert (tag, attributes["sandbox"], attributes["srcdoc"]) == ("iframe", None, shown.decode())
    inner.feed(shown.decode())
    assert not {"script", "img", "a", "link"} & {tag for tag, _ in inner.found}
    text = shown.decode()
    assert text.index(f"Feature {HOSTILE} ") < text.index(f"Feature {DENSE} ")
    for wrong in ((), (12,), (-1,), (0,) * 201):
        with pytest.raises(ValueError, match="show: "):
            show(tmp_path, *wrong)
