"""Measures how fast the app is in a real browser: Playwright with Debian's Chromium against a running server.

    python scripts/bench_browser_index.py /tmp/bench-browser --text PATH       # once
    python scripts/bench_browser.py /tmp/bench-browser --json docs/measurements/bench-browser.json

Every figure is wall-clock time from the key or click until the result is on the screen. Prints a table with the goals
and writes JSON with the hardware, the load of the machine and every time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import machine
from playwright.sync_api import Page, sync_playwright

from browser import launch
from browser.data import scan
from store.features import FeatureIndex

CHROMIUM = "/usr/bin/chromium"
CAPTION = '[data-testid="stCaptionContainer"]:has-text("features")'
GOALS_S = {
    "first view, server just started": 4.0,
    "first view, new visitor": 4.0,
    "feature to feature": 0.7,
    "server part of a feature": 0.08,
    "the same, processor seconds": 0.08,
    "ablation underlines": 1.5,
    "table filter": 0.5,
    "table sort": 0.5,
    "microscope, 256 tokens": 1.5,
    "steering, first text": 1.0,
}
WORDS = "The keeper of the lighthouse counted every ship that passed before the fog came in from the sea . "


@contextmanager
def server(root: Path) -> Iterator[str]:
    """The address of the app on `root`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    line = launch.command(port=port, open_browser=False)
    running = subprocess.Popen(line, env=launch.environment(root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert running.stdout is not None
    while b"URL:" not in running.stdout.readline():
        if running.poll() is not None:
            raise SystemExit("the server stopped before it was ready")
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        running.terminate()
        running.wait(30)


class Bench:
    """One browser on one app; `times` by name of the figure, in seconds."""

    def __init__(self, page: Page, site: str, sae: str) -> None:
        self.page, self.site, self.sae = page, site, sae
        self.times: dict[str, list[float]] = {}
        page.set_default_timeout(240_000)

    def visit(self, view: str, wait: str, **params: str) -> None:
        self.page.goto(f"{self.site}?{urlencode({'sae': self.sae, 'view': view} | params)}")
        self.wait(wait)
        self.idle()

    def wait(self, selector: str) -> None:
        self.page.wait_for_selector(selector, state="attached")

    def idle(self) -> None:
        self.wait('[data-test-script-state="notRunning"]')
        self.page.wait_for_timeout(300)

    def caption(self) -> str:
        """The line below what the page shows; it changes with what is shown."""
        return str(self.page.locator(CAPTION).last.text_content())

    def timed(self, name: str, act: Callable[[], Any], *waits: tuple[str, str]) -> None:
        """Times `act` until each selector is there: one figure for each (name, selector), all from the same start."""
        start = time.monotonic()
        act()
        for figure, selector in waits or ((name, ""),):
            if selector:
                self.wait(selector)
            self.times.setdefault(figure, []).append(time.monotonic() - start)

    def first_view(self, name: str) -> None:
        self.timed(
            name,
            lambda: self.page.goto(f"{self.site}?{urlencode({'sae': self.sae})}"),
            (name, '[data-testid="stDataFrame"] canvas'),
        )

    def features(self, start: int, n: int) -> None:
        drawn = '.groups[data-{}*=":{}:"]'
        self.visit("Feature", drawn.format("underlined", start), feature=str(start))
        self.page.wait_for_timeout(1500)  # Streamlit listens for shortcuts only a moment after the page is drawn
        for number in range(start + 1, start + 1 + n):
            self.timed(
                "feature to feature",
                lambda: self.page.keyboard.press("ArrowRight"),
                ("feature to feature", drawn.format("key", number)),
                ("ablation underlines", drawn.format("underlined", number)),
            )
            self.idle()

    def table(self) -> None:
        self.visit("Features", CAPTION)
        box = self.page.locator('input[aria-label="Search"]')
        for text in ("the", "of", "import", "", "ing"):
            shown = self.caption()
            box.fill(text)
            self.timed(
                "table filter", lambda: box.press("Enter"), ("table filter", f"{CAPTION}:not(:has-text({shown!r}))")
            )
            self.idle()
        self.visit("Features", CAPTION)
        for sort in ("density, highest first", "max activation", "logit kurtosis", "number"):
            self.page.locator('[data-testid="stSelectbox"]').last.locator("input").click()
            option = self.page.get_by_role("option", name=sort, exact=True)
            option.wait_for()
            self.timed("table sort", option.click, ("table sort", f"{CAPTION}:has-text('by {sort}.')"))
            self.idle()

    def microscope(self) -> None:
        self.visit("Microscope", CAPTION, prompt="warm")
        box = self.page.get_by_label("Prompt", exact=True)
        for number in range(4):
            shown = self.caption()
            box.fill("a " * number + WORDS * 10)
            self.timed(
                "microscope, 256 tokens",
                lambda: box.press("Control+Enter"),
                ("microscope, 256 tokens", f"{CAPTION}:not(:has-text({shown!r}))"),
            )
            self.idle()

    def steering(self) -> None:
        self.visit("Steering", '[data-testid="stDataFrame"]', edits="5:set:2", new="64")
        go = self.page.get_by_role("button", name="Generate")
        for _ in range(4):
            self.timed("steering, first text", go.click, ("steering, first text", '[data-testid="stText"]:not(:empty)'))
            self.page.get_by_text("Copy as a command or as Python").wait_for()
            self.idle()


def server_part(root: Path, sae: str, start: int, n: int) -> tuple[list[float], list[float]]:
    """Seconds, and processor seconds, of one run of the Feature page's script without ablation, as AppTest runs it."""
    os.environ[launch.ROOT_VARIABLE] = str(root)
    from streamlit import config
    from streamlit.testing.v1 import AppTest

    for option, value in launch.OPTIONS.items():
        config.set_option(option, value == "true" if value in ("true", "false") else value)

    from browser import live
    from browser.views import feature_examples

    feature_examples._underline = lambda *_: None
    live.warm = lambda *_: None
    page = AppTest.from_file(str(Path(launch.__file__).with_name("app.py")), default_timeout=240)
    page.query_params.update({"sae": sae, "view": "Feature", "feature": str(start)})
    page.run()
    times, processor = [], []
    for _ in range(n):
        begun, used = time.monotonic(), time.process_time()
        page.button(key="goRight").click().run()
        times.append(time.monotonic() - begun)
        processor.append(time.process_time() - used)
    assert not page.exception, page.exception
    return times, processor


def summary(times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    rounded = [round(t, 3) for t in times]
    return {"median_s": round(statistics.median(times), 3), "p95_s": round(p95, 3), "n": len(times), "all_s": rounded}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="directory of runs with an indexed dictionary")
    parser.add_argument("--sae", help="which dictionary (default: the first with an index)")
    parser.add_argument("--features", type=int, default=30, help="steps from feature to feature")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    entries = [entry for entry in scan(args.root.resolve()) if entry.has_index and args.sae in (None, entry.id)]
    if not entries:
        parser.error(f"{args.root} holds no indexed dictionary{f' {args.sae}' if args.sae else ''}")
    sae, index = entries[0].id, FeatureIndex.open(entries[0].index_path)
    begun = machine.hardware()
    with server(args.root) as site, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])

        def visitor() -> Bench:
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            return Bench(page, site, sae)

        bench = visitor()
        bench.first_view("first view, server just started")
        bench.idle()
        for _ in range(5):
            other = visitor()
            other.times = bench.times
            other.first_view("first view, new visitor")
            other.page.context.close()
        bench.features(100, args.features)
        bench.table()
        bench.microscope()
        bench.steering()
        browser.close()
    wall, processor = server_part(args.root, sae, 100, args.features)
    bench.times |= {"server part of a feature": wall, "the same, processor seconds": processor}
    figures = {name: {"goal_s": goal} | summary(bench.times[name]) for name, goal in GOALS_S.items()}
    size = {"features": index.d_sae, "tokens": index.kept_tokens, "firings": int(index.stats["count"].sum())}
    print(f"{size['features']:,} features, {size['tokens']:,} tokens, {size['firings']:,} firings; {begun}")
    print(f"{'':34}{'goal':>7}{'median':>9}{'p95':>9}{'n':>4}")
    for name, found in figures.items():
        print(f"{name:34}{found['goal_s']:7.2f}{found['median_s']:9.3f}{found['p95_s']:9.3f}{found['n']:4}")
    if args.json:
        content = {"hardware": begun, "load_average_after": machine.hardware()["load_average"], "index": size}
        args.json.write_text(json.dumps(content | {"figures": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
