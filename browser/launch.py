"""Starts the app: Streamlit in its own process, reachable from this machine only, or through a proxy on it."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from browser.refusals import BASE_PATH_VARIABLE, HOSTS_VARIABLE
from browser.style import THEME

ROOT_VARIABLE = "MONOSEM_ROOT"
TEXT_MODEL_VARIABLE = "MONOSEM_TEXT_MODEL"  # directory of the text model of the search by meaning; unset: the default
NO_HOME = "/nonexistent"  # Streamlit looks for its settings in the home directory, and fails if it has no name
HOST = "127.0.0.1"
# Any other Host header is refused, so that no web page can reach the app by DNS rebinding.
HOSTS = ["localhost", HOST]
OPTIONS = {
    "server.address": HOST,
    "server.enableStaticServing": "false",
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "server.showEmailPrompt": "false",  # else Streamlit waits for an answer on its first run
    "client.toolbarMode": "minimal",
    "runner.magicEnabled": "false",
    "global.disableWidgetStateDuplicationWarning": "true",  # links and callbacks set the same widgets
}


@dataclass(frozen=True)
class Proxy:
    """How a proxy on this machine shows the app: under which host names, and below which path.

    Raises: ValueError for a name or path that cannot be one.
    """

    hosts: Sequence[str] = ()
    base_path: str = ""

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", host):
                raise ValueError(
                    f"--allow-host {host}: expected a host name such as hub.example.org or *.example.org, without "
                    "https://, port or path. Any host at all is not allowed: a web page could then reach the app."
                )
        if not re.fullmatch(r"(/?[A-Za-z0-9._~@%+-]+)*/?", self.base_path) or ".." in self.base_path:
            raise ValueError(f"--base-path {self.base_path}: expected a path such as /user/ann/proxy/absolute/8501.")

    @property
    def path(self) -> str:
        """The base path without slashes around it; empty without one."""
        return self.base_path.strip("/")


DIRECT = Proxy()


def command(*, port: int, open_browser: bool, proxy: Proxy = DIRECT) -> list[str]:
    """The command line that serves the app on `port`."""
    app = Path(__file__).with_name("server.py")
    options = OPTIONS | {"server.port": str(port), "server.headless": "false" if open_browser else "true"}
    if open_browser:  # with its greeting Streamlit also offers its skills for agents inside the app
        options |= {"logger.hideWelcomeMessage": "true"}
    if proxy.path:
        options["server.baseUrlPath"] = proxy.path
    flags = [f"--{name}={value}" for name, value in (options | THEME).items()]
    flags += [f"--server.allowedHosts={host}" for host in (*HOSTS, *proxy.hosts)]
    # A proxy may put this machine's name in place of its own in the Host header; Origin then still names the proxy.
    for host in proxy.hosts:
        flags += [f"--server.corsAllowedOrigins={scheme}://{host}" for scheme in ("https", "http")]
    # -P: a file in the user's working directory must not shadow a module.
    return [sys.executable, "-P", "-m", "streamlit", "run", str(app), *flags]


def environment(root: Path, proxy: Proxy = DIRECT, text_model: Path | None = None) -> dict[str, str]:
    """This process's environment, plus the root to browse, the text model and the path of the packages."""
    found = os.environ | {
        ROOT_VARIABLE: str(root),
        HOSTS_VARIABLE: " ".join((*HOSTS, *proxy.hosts)),
        BASE_PATH_VARIABLE: proxy.path,
    }
    if text_model:
        found[TEXT_MODEL_VARIABLE] = str(text_model.expanduser().resolve())
    try:
        Path.home()
    except RuntimeError:  # a user without an entry in the password file and without HOME, as in a container
        found["HOME"] = NO_HOME
    packages = Path(__file__).resolve().parent.parent
    if packages.name not in ("site-packages", "dist-packages"):  # a checkout
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), found.get("PYTHONPATH")]))
    return found


def require_free(port: int) -> None:
    """Raises: ValueError if nothing can be served on `port`."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: ports are numbered 1 to 65535.")
    with socket.socket() as probe:
        if os.name == "posix":  # as the server does: a port whose last user has just ended is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"port {port} of {HOST} cannot be used: {error.strerror}. Another `sae browse` may be running; choose "
                f"another port, such as --port {port + 1 if port < 65535 else port - 1}."
            ) from error


def launch(root: Path, *, port: int, open_browser: bool, proxy: Proxy = DIRECT, text_model: Path | None = None) -> int:
    """Serves the runs under `root` until interrupted; returns the exit code of Streamlit.

    Raises ValueError when `root` or `text_model` is not a directory, or nothing can be served on `port`.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory; give the directory that holds your runs")
    if text_model and not text_model.expanduser().is_dir():
        raise ValueError(f"--text-model {text_model}: no directory here; give the one of a sentence-transformers model")
    require_free(port)
    path = f"/{proxy.path}/" if proxy.path else ""
    print(f"monosem: http://localhost:{port}{path}  ({root}; Ctrl-C stops it)", flush=True)
    started = command(port=port, open_browser=open_browser, proxy=proxy)
    with subprocess.Popen(started, env=environment(root, proxy, text_model)) as child:
        # Ending this process must end the server.
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:  # the child received it too and is closing
                continue


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m browser.launch ROOT` with the flags of `sae browse`, which starts it."""
    parser = argparse.ArgumentParser(prog="sae browse")
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=8501)
    parser.add_argument("--no-open", action="store_true")
    parser.add_argument("--allow-host", action="append", default=[])
    parser.add_argument("--base-path", default="")
    parser.add_argument("--text-model", type=Path)
    args = parser.parse_args(argv)
    try:
        proxy = Proxy(tuple(args.allow_host), args.base_path)
        return launch(args.root, port=args.port, open_browser=not args.no_open, proxy=proxy, text_model=args.text_model)
    except ValueError as error:
        print(f"sae browse: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
