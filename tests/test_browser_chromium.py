"""The app in Debian's Chromium: what only a real page shows. Skipped where Chromium is missing."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_fixture import HOSTILE, HOSTILE_TOKENS, build_root

from browser import launch

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
TIMEOUT_MS = 60_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an app serving the fixture."""
    root = tmp_path_factory.mktemp("runs")
    build_root(root, n_contexts=48)
    yield from served(root)


def served(root: Path) -> Iterator[str]:
    """The address of an app serving `root`, which ends with the generator."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    line = launch.command(port=port, open_browser=False)
    server = subprocess.Popen(line, env=launch.environment(root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert server.stdout is not None
    while b"URL:" not in server.stdout.readline():
        assert server.poll() is None, "the server ended before it served"
    yield f"http://127.0.0.1:{port}/"
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, site: str) -> Iterator[Any]:
    """A page that must stay without console errors, exceptions and requests to elsewhere."""
    yield from _watched(chromium, site, "light")


@pytest.fixture
def dark_page(chromium: Any, site: str) -> Iterator[Any]:
    yield from _watched(chromium, site, "dark")


def _watched(chromium: Any, site: str, scheme: str) -> Iterator[Any]:
    page = chromium.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page.set_default_timeout(TIMEOUT_MS)
    errors: list[str] = []
    outside: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: None if _local(r.url, site) else outside.append(r.url))
    yield page
    assert page.locator('[data-testid="stException"]').count() == 0
    assert errors == []
    assert outside == []
    page.close()


def _local(url: str, site: str) -> bool:
    return url.startswith((site, site.replace("http", "ws", 1), "data:", "blob:"))


def wait_feature(page: Any, number: int) -> None:
    page.wait_for_selector(f'#done[data-feature="{number}"]', state="attached")
    wait_idle(page)


def wait_idle(page: Any) -> None:
    page.wait_for_selector('[data-test-script-state="notRunning"]', state="attached")


def test_table_row_opens_its_feature_and_back_returns(page: Any, site: str) -> None:
    page.goto(site)
    table = page.locator('[data-testid="stDataFrame"]')
    table.wait_for()
    wait_idle(page)
    page.wait_for_timeout(500)  # the table is drawn on a canvas: nothing to wait for
    box = table.bounding_box()
    page.mouse.click(box["x"] + 18, box["y"] + 32 + 27 * 4 + 13)  # fifth row's box
    wait_feature(page, 4)
    assert "feature=4" in page.url
    page.go_back()
    table.wait_for()
    page.go_forward()
    wait_feature(page, 4)


def test_hostile_tokens_are_text_and_nothing_else(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature={HOSTILE}&around=whole")
    page.wait_for_selector(".groups .tok")
    wait_feature(page, HOSTILE)
    texts = set(page.eval_on_selector_all(".tok", "nodes => nodes.map(n => n.textContent)"))
    assert set(HOSTILE_TOKENS) <= texts
    assert page.evaluate("window.__x") is None
    assert page.evaluate("getComputedStyle(document.body).display") == "block"
    assert page.locator(".tok img, .tok a, .tok script, .label img, .label a").count() == 0


def test_hovering_a_token_shows_its_details(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature={HOSTILE}")
    hit = page.locator(".tok.hit").first
    hit.hover()
    tip = page.locator(".groups .tip")
    tip.wait_for()
    assert hit.text_content().strip() in tip.text_content()
    for name in ("token id", "position", "activation", "100 % of max", "document", "domain"):
        assert name in tip.text_content()
    box = tip.bounding_box()
    near = hit.bounding_box()
    assert abs(box["y"] - near["y"]) < 200


def test_keyboard_goes_to_the_next_feature_and_neighbours_open(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature=4")
    wait_feature(page, 4)
    page.wait_for_timeout(2000)  # the content stands before Streamlit listens for shortcuts
    page.keyboard.press("ArrowRight")
    wait_feature(page, 5)
    page.keyboard.press("ArrowLeft")
    wait_feature(page, 4)
    neighbour = page.locator(".row.open").first
    number = int(neighbour.locator(".prefix").text_content())
    neighbour.click()
    wait_feature(page, number)
    assert f"feature={number}" in page.url
    page.go_back()
    wait_feature(page, 4)


def test_slash_goes_to_the_search_and_question_mark_lists_the_keys(page: Any, site: str) -> None:
    page.goto(site)
    page.wait_for_selector("#features-done", state="attached")
    page.wait_for_selector("dialog.keys", state="attached")
    page.keyboard.press("?")
    keys = page.get_by_role("dialog", name="Keys")
    keys.wait_for()
    assert "next feature" in keys.text_content()
    page.keyboard.press("Escape")
    keys.wait_for(state="hidden")
    page.keyboard.press("/")
    page.keyboard.type("the?/")  # in a box they are letters
    assert page.locator('input[aria-label="Search"]').input_value() == "the?/"
    assert keys.count() == 0
    page.keyboard.press("Escape")
    page.goto(f"{site}?view=Feature&feature=4")
    wait_feature(page, 4)
    page.wait_for_selector("dialog.keys", state="attached")
    page.keyboard.press("/")
    page.keyboard.type("6")
    page.keyboard.press("Enter")
    wait_feature(page, 6)


def drag(page: Any, chart: int, low: float, high: float) -> None:
    """Drags over the histogram number `chart` between two shares of its width."""
    box = page.locator(".charts .plot").nth(chart).bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + low * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + high * box["width"], y, steps=4)
    page.mouse.up()


def test_a_range_dragged_over_the_activations_shows_its_examples(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature=4")
    page.wait_for_selector(".groups .tok")
    wait_feature(page, 4)
    most = float(page.locator(".group .note").first.text_content().removeprefix("max "))
    drag(page, 0, 0.25, 0.75)
    group = page.locator(".group", has_text="Your range")
    group.wait_for()
    values = [float(text) for text in group.locator(".example .value").all_text_contents()]
    assert values
    assert all(0.24 * most <= value <= 0.76 * most for value in values)
    assert "range=" in page.url
    page.go_back()
    group.wait_for(state="detached")


def test_dark_theme(dark_page: Any, site: str) -> None:
    dark_page.goto(f"{site}?view=Feature&feature=0")
    dark_page.wait_for_selector(".tok.on")
    background, text = dark_page.eval_on_selector(
        ".tok.hit", "n => [getComputedStyle(n).backgroundColor, getComputedStyle(n).color]"
    )
    page_colour = dark_page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    assert page_colour == "rgb(21, 24, 29)"
    assert text == "rgb(227, 229, 232)"
    assert background.startswith("oklch(")
    lightness = float(background.removeprefix("oklch(").split()[0])
    assert lightness < 0.62  # light text stays readable on the strongest orange


def test_dead_feature_and_missing_index_render(page: Any, site: str) -> None:
    page.goto(f"{site}?view=Feature&feature=7")
    page.get_by_text("Feature 7 is dead").wait_for()
    page.goto(f"{site}?sae=demo/no-index")
    page.get_by_text("has no feature index yet").wait_for()
    page.goto(f"{site}?view=Steering")
    page.get_by_text("Steering needs the model").wait_for()
