"""The model behind the pages: the only room of the browser that runs a network, one module for each use of it."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from browser.data import SaeEntry

MAX_PROMPT = 2_000  # characters


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
    model = model if isinstance(model, dict) else {}
    name, sha256 = str(model.get("id", "")), str(model.get("sha256", ""))
    found = _load(entry.id, str(entry.path), name, weights.stat().st_mtime_ns)
    from sae.dictionary.autoencoder import refuse_transcoder
    from store.common import same_model

    refuse_transcoder(found.sae, entry.id, LiveError)
    if sha256 and not same_model(model, found.model.identity()):
        raise LiveError(
            f"The language model {name!r} has changed since {entry.id} was trained: its weights are "
            f"{found.model.weights_sha256[:12]}…, expected {sha256[:12]}…. What it computed would be wrong here."
        )
    return found


_warmed: set[Path] = set()


def warm(entry: SaeEntry) -> None:
    """Loads the entry's model in the background, once, so that the first ablation or prompt need not wait for it.

    What goes wrong there is told by the page that needs the model.
    """
    if entry.path in _warmed or not (entry.path / "sae.safetensors").is_file():
        return
    _warmed.add(entry.path)
    threading.Thread(target=_warm, args=(entry,), daemon=True, name="warm").start()


def _warm(entry: SaeEntry) -> None:
    from browser.live import prompts

    with contextlib.suppress(ValueError, OSError):
        loaded = load(entry)
        prompts.inspect(loaded, entry, prompts.encode(loaded, "one two"))  # the kernels are compiled at first use


@st.cache_resource(max_entries=2, show_spinner="Loading the model …")
def _load(sae_id: str, path: str, model_name: str, stamp: int) -> Live:
    try:
        import sae
        from sae.lm import load_model

        return Live(load_model(model_name, device="cpu"), sae.load(path))
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise LiveError(f"The language model {model_name!r} of {sae_id} could not be loaded: {error}") from error
