"""Compares two dictionaries by their decoder directions, without any text."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from browser.data import SaeEntry
from browser.live import LiveError


def cosine_table(a: SaeEntry, b: SaeEntry) -> pd.DataFrame:
    """The nearest feature of B by decoder cosine, for each of A: feature, cosine_best, cosine. Raises LiveError."""
    for entry in (a, b):
        if not (entry.path / "sae.safetensors").is_file():
            raise LiveError(f"{entry.id} has no sae.safetensors, so its decoder cannot be read.")
    stamps = tuple((entry.path / "sae.safetensors").stat().st_mtime_ns for entry in (a, b))
    return _cosine_table(a.path, b.path, stamps)


@st.cache_resource(max_entries=8, show_spinner="Comparing decoders …")
def _cosine_table(a: Path, b: Path, stamps: tuple[int, ...]) -> pd.DataFrame:
    from sae.dictionary.directions import best_cosines
    from sae.dictionary.files import load

    try:
        first, second = load(a), load(b)
        found = best_cosines(first.W_dec.detach(), second.W_dec.detach())
    except (OSError, ValueError, RuntimeError) as error:
        raise LiveError(f"The decoders of {a.name} and {b.name} cannot be compared: {error}") from error
    return pd.DataFrame({"feature": range(first.d_sae), "cosine_best": found.of_a, "cosine": found.cosine_a})
