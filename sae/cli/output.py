"""Standard output and error: characters that their encoding lacks, and a reader that has gone."""

from __future__ import annotations

import io
import os
import select
import sys


def escape_unknown_characters() -> None:
    r"""Prints characters that the terminal's or file's encoding lacks (cp1252, Latin-1, ASCII) as escapes: ‖ as \u2016.

    Python's default is an error, which would lose the whole table after the work is done. A handler that the user
    chose (PYTHONIOENCODING=ascii:replace) stays.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def nobody_reads() -> bool:
    """Whether the reader of our output has closed the pipe, as `sae info PATH | head -1` does; then printing stops."""
    if not hasattr(select, "poll"):  # Windows
        return False
    watched = select.poll()
    watched.register(sys.stdout, 0)  # errors are reported without being asked for
    if not watched.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to flush at exit
    return True
