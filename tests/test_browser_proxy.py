"""The app behind a reverse proxy: under another host name, below a path; and what the page says when that fails."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser_sites import ARGUMENTS, CHROMIUM, TIMEOUT_MS, wait_feature, wait_idle
from reverse_proxy import reverse_proxy

from browser import launch
from browser.launch import Proxy, require_free

HUB, BASE = "hub.example.org", "/user/ann/proxy/absolute/8501"
PATIENT_MS = 30_000


@contextmanager
def serving(root: Path, proxy: Proxy) -> Iterator[int]:
    """The port of an app that was started for this proxy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    line = launch.command(port=port, open_browser=False, proxy=proxy)
    environment = launch.environment(root, proxy)
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        assert server.stdout is not None
        while b"URL:" not in server.stdout.readline():
            assert server.poll() is None, "the server ended before it served"
        yield port
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def behind_hub(planted_root: Path) -> Iterator[int]:
    with serving(planted_root, Proxy((HUB,), BASE)) as port:
        yield port


@pytest.fixture(scope="module")
def page(chromium: Any) -> Iterator[Any]:
    """A page of a Chromium for which the hub's name is this machine."""
    playwright = pytest.importorskip("playwright.sync_api")
    assert playwright
    resolved = f"--host-resolver-rules=MAP {HUB} 127.0.0.1, MAP other.example.org 127.0.0.1"
    browser = chromium.browser_type.launch(executable_path=str(CHROMIUM), args=[*ARGUMENTS, resolved])
    opened = browser.new_page()
    opened.set_default_timeout(TIMEOUT_MS)
    yield opened
    browser.close()


@pytest.mark.parametrize("host", [None, "127.0.0.1"], ids=["Host kept", "Host replaced"])
def test_links_components_and_downloads_work_below_a_path_of_another_host(
    behind_hub: int, page: Any, host: str | None
) -> None:
    with reverse_proxy(behind_hub, host=host) as port:
        site = f"http://{HUB}:{port}{BASE}/"
        page.goto(f"{site}?sae=demo%2Ftm&view=Feature&feature=1")
        wait_feature(page, 1)
        page.locator(".charts .plot").first.wait_for()  # drawn by our component's script
        assert page.locator("#mono-refused").count() == 0
        wait_idle(page)  # a run that is under way would replace the button
        page.get_by_role("button", name="Export").click()
        wait_idle(page)
        with page.expect_download() as download:
            page.get_by_role("button", name="HTML: this feature").click()
        assert Path(download.value.path()).stat().st_size > 0
        page.locator(".mono-brand a").click()
        wait_idle(page)
        assert page.url == site


def test_a_page_at_a_host_that_is_not_allowed_says_how_to_allow_it(behind_hub: int, page: Any) -> None:
    with reverse_proxy(behind_hub) as port:
        page.goto(f"http://other.example.org:{port}{BASE}/")
        said = page.wait_for_selector("#mono-refused", timeout=PATIENT_MS).text_content()
    assert f"It accepts connections for localhost, 127.0.0.1, {HUB}, and" in said
    assert "sae browse --allow-host other.example.org" in said


def test_a_proxy_without_websockets_is_named(behind_hub: int, page: Any) -> None:
    with reverse_proxy(behind_hub, websockets=False) as port:
        page.goto(f"http://{HUB}:{port}{BASE}/")
        said = page.wait_for_selector("#mono-refused", timeout=PATIENT_MS).text_content()
    assert "does not pass on WebSocket connections" in said


def test_a_request_outside_the_base_path_is_explained(behind_hub: int, page: Any) -> None:
    page.goto(f"http://127.0.0.1:{behind_hub}/elsewhere")
    assert f"served under {BASE}/" in page.locator("body").text_content()
    assert "asked for /elsewhere" in page.locator("body").text_content()


def test_the_default_stays_on_this_machine() -> None:
    line = launch.command(port=1, open_browser=False)
    assert [flag for flag in line if "allowedHosts" in flag or "Origins" in flag or "baseUrl" in flag] == [
        "--server.allowedHosts=localhost",
        "--server.allowedHosts=127.0.0.1",
    ]
    proxied = launch.command(port=1, open_browser=False, proxy=Proxy((HUB,), BASE))
    assert "--server.address=127.0.0.1" in proxied
    assert f"--server.allowedHosts={HUB}" in proxied
    assert f"--server.baseUrlPath={BASE[1:]}" in proxied


@pytest.mark.parametrize("host", ["*", "https://hub.example.org", "hub.example.org:443", "hub/user", "", "a b"])
def test_a_host_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="expected a host name"):
        Proxy((host,))


@pytest.mark.parametrize("path", ["/a/../b", "http://x/y", "/a b", "/a?b", '/"'])
def test_a_base_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="--base-path"):
        Proxy((), path)


def test_a_taken_port_is_refused_before_anything_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert launch.main([str(tmp_path), "--port", str(port), "--no-open"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"port {port} of 127.0.0.1 cannot be used: Address already in use" in said.err
    require_free(port)
    with pytest.raises(ValueError, match="1 to 65535"):
        require_free(70_000)


def test_browse_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sae.cli import main

    started: list[Any] = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: started.append((command, env)) or 0)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert main(["browse", str(tmp_path), "--no-open", "--allow-host", HUB, "--base-path", BASE]) == 0
    ((command, environment),) = started
    assert command[3:] == [str(tmp_path), "--port", "8501", f"--allow-host={HUB}", f"--base-path={BASE}", "--no-open"]
    assert environment["PYTHONIOENCODING"] == "ascii:backslashreplace"
