"""The one button that downloads a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st


def download(label: str, file: str, mime: str, write: Callable[[], bytes], at: Any = st) -> None:
    """A button that calls `write` when it is pressed and saves the bytes as `file`.

    The page does not run again: a run that begins at once can discard the bytes before the browser has asked for them.
    """
    at.download_button(
        label, data=write, file_name=file, mime=mime, key=f"download-{label}-{file}", width="stretch", on_click="ignore"
    )
