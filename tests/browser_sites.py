"""Fixtures of the app's tests: roots to browse, servers on them and one Chromium, each made once per worker."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
TIMEOUT_MS = 60_000
IDLE = '[data-test-script-state="notRunning"]'


@pytest.fixture(scope="session")
def planted_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose every number is known (see browser_fixture): `demo/tm` with an index, `demo/no-index` without."""
    from browser_fixture import build_root

    path = tmp_path_factory.mktemp("planted")
    build_root(path, n_contexts=48)
    return path


@pytest.fixture(scope="session")
def live_root(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_store: Path) -> Path:
    """A root with a real tiny model behind it: `tiny/a` and `tiny/b`, evaluated, indexed and compared."""
    from browser_live_fixture import build_live_root

    return build_live_root(tmp_path_factory.mktemp("live"), tiny_model, tiny_store)


def served(root: Path) -> Iterator[str]:
    """The address of an app that serves `root` until the generator ends."""
    from browser import launch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    line = launch.command(port=port, open_browser=False)
    environment = launch.environment(root)
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        assert server.stdout is not None
        while b"URL:" not in server.stdout.readline():
            assert server.poll() is None, "the server ended before it served"
        yield f"http://127.0.0.1:{port}/"
        server.terminate()
        server.wait(30)  # before the pipe is closed: Streamlit prints that it stops, and would hang if it could not


@pytest.fixture(scope="session")
def planted_site(planted_root: Path) -> Iterator[str]:
    yield from served(planted_root)


@pytest.fixture(scope="session")
def live_site(live_root: Path) -> Iterator[str]:
    yield from served(live_root)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, started once. Skips where it or Playwright is missing."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def windows(chromium: Any) -> Iterator[Callable[[str], Any]]:
    """A window for each colour scheme; its pages share a cache, so Streamlit's scripts are loaded once."""
    made: dict[str, Any] = {}

    def window(scheme: str) -> Any:
        if scheme not in made:
            made[scheme] = chromium.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
        return made[scheme]

    yield window
    for each in made.values():
        each.close()


@pytest.fixture
def open_page(windows: Callable[[str], Any]) -> Iterator[Callable[..., Any]]:
    """Opens a page on a site. At the end it must have shown no exception, no console error, no request elsewhere."""
    opened: list[tuple[Any, list[str], list[str]]] = []

    def open_one(site: str, scheme: str = "light") -> Any:
        page = windows(scheme).new_page()
        page.set_default_timeout(TIMEOUT_MS)
        errors: list[str] = []
        outside: list[str] = []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda r: None if _local(r.url, site) else outside.append(r.url))
        opened.append((page, errors, outside))
        return page

    yield open_one
    for page, errors, outside in opened:
        assert page.locator('[data-testid="stException"]').count() == 0
        assert errors == []
        assert outside == []
        page.close()


def _local(url: str, site: str) -> bool:
    return url.startswith((site, site.replace("http", "ws", 1), "data:", "blob:"))


def wait_idle(page: Any) -> None:
    """Until the app's script has ended."""
    page.wait_for_selector(IDLE, state="attached")


def wait_feature(page: Any, number: int) -> None:
    """Until the page of a feature is complete, with its underlines if its model can be run."""
    page.locator(".mono-title").get_by_text(f"Feature {number:,}", exact=True).wait_for()
    wait_idle(page)


def wait_shortcuts(page: Any) -> None:
    """Until Streamlit has loaded what listens for shortcuts."""
    wait_idle(page)
    page.wait_for_load_state("networkidle")


def drawn_table(page: Any) -> Any:
    """The table of a page, once its cells are drawn."""
    page.locator('[data-testid="stDataFrame"] [data-testid="glide-cell-1-0"]').wait_for(state="attached")
    wait_idle(page)
    return page.locator('[data-testid="stDataFrame"]')


def drag(page: Any, chart: int, low: float, high: float) -> None:
    """Drags over the histogram number `chart` between two shares of its width."""
    box = page.locator(".charts .plot").nth(chart).bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + low * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + high * box["width"], y, steps=4)
    page.mouse.up()
