"""Says on the page why it cannot reach its app, which happens behind proxies: Streamlit shows an empty page for ever.

The page is loaded by plain requests, which any proxy passes on. The app then needs a WebSocket: the server refuses it
for hosts that are not allowed, and proxies drop it unless they are set up for it.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

HOSTS_VARIABLE, BASE_PATH_VARIABLE = "MONOSEM_HOSTS", "MONOSEM_BASE_PATH"
HELP = "docs/browser.md, “Behind JupyterHub or a proxy”"
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
_SCRIPT = (Path(__file__).parent / "components" / "refusals.js").read_text(encoding="utf-8")


class ExplainRefusals:
    """Middleware: adds a script to the page that shows why no connection came about; explains a wrong base path."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.hosts = os.environ.get(HOSTS_VARIABLE, "localhost").split()
        self.base_path = os.environ.get(BASE_PATH_VARIABLE, "")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or not _asks_for_page(scope):
            await self.app(scope, receive, send)
            return
        if self.base_path and not f"{scope['path']}/".startswith(f"/{self.base_path}/"):
            await _answer(send, 404, wrong_path(self.base_path, scope["path"]).encode())
            return
        # The page is changed below, so it must not come compressed, and its length is another.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        await self.app(scope, receive, _with_script(send, self.hosts))


def wrong_path(base_path: str, asked: str) -> str:
    """The page for a request outside the base path."""
    return (
        f"<!doctype html><title>monosem</title><p>This app is served under <b>/{html.escape(base_path)}/</b>, and this "
        f"request asked for <b>{html.escape(asked)}</b>. If a proxy removes the prefix, start <code>sae browse</code> "
        f"without --base-path; if it keeps the prefix, give exactly that one. See {html.escape(HELP)}."
    )


def script(hosts: Sequence[str]) -> bytes:
    """The script element that explains a page without a connection."""
    known = json.dumps({"hosts": list(hosts), "help": HELP}).replace("<", "\\u003c")
    return f"<script>({_SCRIPT.strip()})({known})</script>".encode()


def _asks_for_page(scope: Message) -> bool:
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])


async def _answer(send: Send, status: int, page: bytes) -> None:
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(page)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": page})


def _with_script(send: Send, hosts: Sequence[str]) -> Send:
    """Passes a response on; the script is added to an HTML page."""
    start: Message = {}
    parts: list[bytes] = []

    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start" and _is_page(message):
            start.update(message)
            return
        if not start or message["type"] != "http.response.body":
            await send(message)
            return
        parts.append(message.get("body", b""))
        if message.get("more_body"):
            return
        page = b"".join(parts).replace(b"</body>", script(hosts) + b"</body>", 1)
        headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(page)).encode())]})
        await send({"type": "http.response.body", "body": page})

    return changed


def _is_page(message: Message) -> bool:
    return message["status"] == 200 and any(
        name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in message["headers"]
    )
