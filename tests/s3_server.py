"""A real S3 server process on loopback (moto), which fails on request: `start` gives its address."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

KINDS = ("500", "slow", "cut", "lost")


class Faulty:
    """WSGI middleware: a share of the requests is answered with 500, late, not at all, or only after it took effect."""

    def __init__(self, app: Callable[..., Iterable[bytes]], faults: Path) -> None:
        self.app, self.faults, self.rng = app, faults, random.Random(3)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        words = self.faults.read_text().split() if self.faults.exists() else []
        kind = self.rng.choice(words[1:]) if words and self.rng.random() < float(words[0]) else ""
        if kind == "500":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        if kind == "slow":
            time.sleep(0.05)
        if kind == "cut":
            return self._cut(environ)
        answer = list(self.app(environ, start_response))
        return self._cut(environ) if kind == "lost" else answer

    def _cut(self, environ: dict[str, Any]) -> Iterable[bytes]:
        environ["werkzeug.socket"].shutdown(2)
        raise ConnectionError("cut on purpose")


def serve(faults: str) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = Faulty(DomainDispatcherApplication(create_backend_app), Path(faults))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


def start(faults: Path) -> tuple[subprocess.Popen[str], str]:
    """The server's process and address; `faults` is a file `SHARE KIND KIND …` that it reads at each request."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(faults)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    url = f"http://127.0.0.1:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    return process, url


def stop(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


if __name__ == "__main__":
    serve(sys.argv[1])
