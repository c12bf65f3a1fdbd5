"""The model behind the pages: steering. The only part of the browser that runs a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st

from browser.data import SaeEntry

MAX_PROMPT = 2_000  # characters
MAX_NEW_TOKENS = 128
MODES = ("set", "add", "scale", "ablate")


class LiveError(ValueError):
    """The model or the dictionary cannot be run; the message says why and what to do."""


@dataclass(frozen=True)
class Live:
    """A language model (with its lock) and an SAE, loaded once for all sessions."""

    model: Any
    sae: Any


def load(entry: SaeEntry) -> Live:
    """The entry's weights and its language model. Raises LiveError when one is missing."""
    weights = entry.path / "sae.safetensors"
    if not weights.is_file():
        raise LiveError(
            f"{entry.id} has no sae.safetensors, so there is no dictionary to run. Train it again, "
            "or copy the file back into its directory."
        )
    model = entry.config.get("model")
    name = str(model.get("id", "")) if isinstance(model, dict) else ""
    return _load(entry.id, str(entry.path), name, weights.stat().st_mtime_ns)


@st.cache_resource(max_entries=2, show_spinner="Loading the model …")
def _load(sae_id: str, path: str, model_name: str, stamp: int) -> Live:
    try:
        import sae
        from sae.lm import load_model

        return Live(load_model(model_name, device="cpu"), sae.load(path))
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise LiveError(f"The language model {model_name!r} of {sae_id} could not be loaded: {error}") from error


def steer(
    live: Live,
    prompt: str,
    *,
    feature: int,
    mode: str,
    value: float,
    seed: int,
    new_tokens: int,
    feature_max: np.ndarray,
) -> Iterator[Any]:
    """`sae.steering.steer_stream` with one edit, within the app's limits.

    `value` is in multiples of the feature's maximum for "set" and "add", a factor for "scale".
    Yields the growing result after each token. Raises LiveError beyond the limits.
    """
    if not prompt.strip():
        raise LiveError("The prompt is empty: write a few words for the model to continue.")
    if len(prompt) > MAX_PROMPT:
        raise LiveError(f"The prompt has {len(prompt):,} characters; at most {MAX_PROMPT:,}.")
    if not 1 <= new_tokens <= MAX_NEW_TOKENS:
        raise LiveError(f"{new_tokens} new tokens asked for; at most {MAX_NEW_TOKENS}.")
    if mode in ("set", "add") and not feature_max[feature] > 0:
        raise LiveError(
            f"Feature {feature} never fired in the indexed text, so there is no maximum to "
            f"measure {mode!r} in. Choose scale or ablate, or another feature."
        )
    from sae.steering import Edit, steer_stream

    yield from steer_stream(
        live.model,
        live.sae,
        prompt,
        [Edit(feature, mode, value)],
        seed=seed,
        max_new_tokens=new_tokens,
        feature_max=feature_max,
    )
