"""Starts the app: Streamlit in its own process, reachable from this machine only."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from browser.style import THEME

ROOT_VARIABLE = "MONOSEM_ROOT"
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


def command(*, port: int, open_browser: bool) -> list[str]:
    """The command line that serves the app on `port`."""
    app = Path(__file__).with_name("app.py")
    options = OPTIONS | {"server.port": str(port), "server.headless": "false" if open_browser else "true"}
    flags = [f"--{name}={value}" for name, value in (options | THEME).items()]
    flags += [f"--server.allowedHosts={host}" for host in HOSTS]
    # -P: a file in the user's working directory must not shadow a module.
    return [sys.executable, "-P", "-m", "streamlit", "run", str(app), *flags]


def environment(root: Path) -> dict[str, str]:
    """This process's environment, plus the root to browse and the path of the packages."""
    found = os.environ | {ROOT_VARIABLE: str(root)}
    packages = Path(__file__).resolve().parent.parent
    if packages.name not in ("site-packages", "dist-packages"):  # a checkout
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), found.get("PYTHONPATH")]))
    return found


def launch(root: Path, *, port: int, open_browser: bool) -> int:
    """Serves the runs under `root` until interrupted; returns the exit code of Streamlit.

    Raises ValueError when `root` is not a directory.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory; give the directory that holds your runs")
    print(f"monosem: http://localhost:{port}  ({root}; Ctrl-C stops it)", flush=True)
    started = command(port=port, open_browser=open_browser)
    with subprocess.Popen(started, env=environment(root)) as child:
        # Ending this process must end the server.
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:  # the child received it too and is closing
                continue


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m browser.launch ROOT [--port N] [--no-open]`: what `sae browse` starts."""
    parser = argparse.ArgumentParser(prog="sae browse")
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=8501)
    parser.add_argument("--no-open", action="store_true")
    args = parser.parse_args(argv)
    try:
        return launch(args.root, port=args.port, open_browser=not args.no_open)
    except ValueError as error:
        print(f"sae browse: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
