"""Colours and fonts of the app, light and dark, and CSS for what Streamlit has no option for."""

from __future__ import annotations

import numpy as np
from PIL import Image

ORANGE, BLUE, VIOLET, GREEN = "#e8820c", "#3f7fc1", "#8a6fb3", "#3d9a6a"

# Theme option → value, as flags of `streamlit run` (an installed app has no config.toml).
THEME: dict[str, str] = {
    "theme.baseFontSize": "14",
    "theme.baseRadius": "6px",
    "theme.codeFontSize": "12.5px",
    "theme.paddingTop": "0.4rem",
    "theme.light.primaryColor": "#2f6fb0",
    "theme.light.backgroundColor": "#fdfdfc",
    "theme.light.secondaryBackgroundColor": "#f3f2ef",
    "theme.light.textColor": "#23272d",
    "theme.light.linkColor": "#2a65a3",
    "theme.light.borderColor": "#dedcd6",
    "theme.dark.primaryColor": "#6aa5dd",
    "theme.dark.backgroundColor": "#15181d",
    "theme.dark.secondaryBackgroundColor": "#1f242b",
    "theme.dark.textColor": "#e3e5e8",
    "theme.dark.linkColor": "#86b8e8",
    "theme.dark.borderColor": "#343a43",
}

CSS = """<style>
[data-testid="stMainBlockContainer"] { padding-left: 1.6rem; padding-right: 1.6rem;
  padding-bottom: 3rem; }
[data-testid="stMainBlockContainer"] [data-testid="stVerticalBlock"] { gap: 0.65rem; }
.st-key-keys { position: absolute; }
.st-key-bar [data-testid="stButtonGroup"] button { padding-left: 0.5rem; padding-right: 0.5rem; }
.mono-brand { font-weight: 650; letter-spacing: 0.01em; font-size: 1.12rem; white-space: nowrap; }
.mono-brand a { color: inherit; text-decoration: none; }
.mono-brand i { font-style: normal; color: #e8820c; }
.mono-links a { color: #3f7fc1; }
.mono-links { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin-top: 0.35rem; }
.mono-title { font-size: 1.28rem; font-weight: 650; margin-right: 0.6rem; }
.mono-facts { display: flex; flex-wrap: wrap; gap: 0.2rem 1.5rem; align-items: baseline; }
.mono-facts div { white-space: nowrap; font-variant-numeric: tabular-nums; }
.mono-facts span { opacity: 0.62; font-size: 0.86rem; margin-right: 0.35rem; }
.mono-facts .mono-help { cursor: help; font-size: 0.8rem; opacity: 0.7; border-radius: 9px; padding: 0 0.4rem;
  border: 1px solid rgb(128 128 128 / 0.5); }
.mono-flag { border: 1px solid currentColor; border-radius: 9px; padding: 0 0.5rem; opacity: 0.8;
  font-size: 0.82rem; }
.mono-source { opacity: 0.62; font-size: 0.84rem; overflow-wrap: anywhere; }
.mono-head { font-size: 0.92rem; font-weight: 600; }
.mono-notice { border: 1px solid rgb(128 128 128 / 0.35); border-left: 3px solid #3f7fc1;
  border-radius: 6px; padding: 0.6rem 0.9rem; max-width: 60rem; overflow-wrap: anywhere; }
.mono-notice code { display: inline-block; margin-top: 0.4rem; white-space: pre-wrap; }
</style>"""


def icon() -> Image.Image:
    """The tab's icon, 32 × 32: three by three tiles, one lit. Drawn here because a named icon would be downloaded."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    for row in range(3):
        for column in range(3):
            colour = (232, 130, 12, 255) if (row, column) == (1, 1) else (63, 127, 193, 120)
            pixels[2 + 10 * row : 10 + 10 * row, 2 + 10 * column : 10 + 10 * column] = colour
    return Image.fromarray(pixels)
