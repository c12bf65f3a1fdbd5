"""A reverse proxy in a thread, as JupyterHub and nginx put one before an app: it may rewrite the Host header."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HEAD_END = b"\r\n\r\n"


@contextmanager
def reverse_proxy(port: int, *, host: str | None = None, websockets: bool = True) -> Iterator[int]:
    """The port of a proxy before `port` on this machine; `host` replaces the Host header, as nginx does by default.

    Without `websockets` it drops the Upgrade header, as a proxy that was not set up for them does.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve, args=(listener, port, host, websockets), daemon=True).start()
        yield int(listener.getsockname()[1])


def _serve(listener: socket.socket, port: int, host: str | None, websockets: bool) -> None:
    with suppress(OSError):  # closed at the end
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_forward, args=(client, port, host, websockets), daemon=True).start()


def _forward(client: socket.socket, port: int, host: str | None, websockets: bool) -> None:
    """Passes on one request, or one WebSocket until either side closes it."""
    with suppress(OSError), client, socket.create_connection(("127.0.0.1", port)) as server:
        head = b""
        while HEAD_END not in head:
            received = client.recv(65536)
            if not received:
                return
            head += received
        head, _, body = head.partition(HEAD_END)
        request, *lines = head.split(b"\r\n")
        upgrade = any(line.lower().startswith(b"upgrade:") for line in lines)
        dropped = [b"host:"] if host else []
        dropped += [] if upgrade and websockets else [b"connection:", b"upgrade:"]
        kept = [line for line in lines if not line.lower().startswith(tuple(dropped))]
        kept += [f"Host: {host}".encode()] if host else []
        kept += [] if upgrade and websockets else [b"Connection: close"]
        server.sendall(b"\r\n".join([request, *kept]) + HEAD_END + body)
        threading.Thread(target=_pump, args=(client, server), daemon=True).start()
        _pump(server, client)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while received := source.recv(65536):
            target.sendall(received)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
