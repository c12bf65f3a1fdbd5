"""The only part of the browser that runs a language model; one module per use."""

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
    """The model or the dictionary cannot be run; the message says why and what to do about it."""


@dataclass(frozen=True)
class Live:
    """A language model (with its lock) and a dictionary, loaded once for all sessions."""

    model: Any
    sae: Any


def load(entry: SaeEntry, *, transcoders: bool = False) -> Live:
    """The entry's weights and its language model. Raises LiveError if one is missing or has changed.

    Also for a transcoder, unless the caller is ready for one: `transcoders`.
    """
    weights = entry.path / "sae.safetensors"
    if not weights.is_file():
        raise LiveError(
            f"{entry.id} has no sae.safetensors, so its dictionary cannot be run. Train it again, or copy the file "
            "back into its directory."
        )
    if entry.is_crosscoder:
        raise LiveError(
            f"{entry.id} is a crosscoder: its rows join several hook points or models, so no single model can be run "
            "for it. Its evaluation is on the page Run, and `sae eval` prints it."
        )
    if not entry.has_model:
        raise LiveError(f"The activations of {entry.id} came as arrays, without a model that could be run.")
    model = entry.config.get("model")
    model = model if isinstance(model, dict) else {}
    name, sha256 = str(model.get("id", "")), str(model.get("sha256", ""))
    found = _load(entry.id, str(entry.path), name, sha256 or None, weights.stat().st_mtime_ns)
    from sae.dictionary.autoencoder import refuse_row_scale, refuse_transcoder
    from store.common import same_model

    if not transcoders:
        refuse_transcoder(found.sae, entry.id, LiveError)
    refuse_row_scale(found.sae, entry.id, LiveError)
    if sha256 and not same_model(model, found.model.identity()):
        raise LiveError(
            f"The language model {name!r} has changed since {entry.id} was trained: its weights are "
            f"{found.model.weights_sha256[:12]}…, expected {sha256[:12]}…. Its activations do not fit the dictionary."
        )
    return found


_warmed: set[Path] = set()


def warm(entry: SaeEntry) -> None:
    """Loads the entry's model in the background, once, so that the first ablation or prompt does not wait for it.

    Errors are ignored here: the page that needs the model reports them.
    """
    if entry.path in _warmed or not entry.has_model or not (entry.path / "sae.safetensors").is_file():
        return
    _warmed.add(entry.path)
    threading.Thread(target=_warm, args=(entry,), daemon=True, name="warm").start()


def _warm(entry: SaeEntry) -> None:
    from browser.live import prompts

    with contextlib.suppress(ValueError, OSError):
        loaded = load(entry)
        prompts.inspect(loaded, entry, prompts.encode(loaded, "one two"))  # compiles the kernels


@st.cache_resource(max_entries=2, show_spinner="Loading the model …")
def _load(sae_id: str, path: str, model_name: str, weights_sha256: str | None, stamp: int) -> Live:
    try:
        import sae
        from sae.lm import load_model

        return Live(load_model(model_name, device="cpu", weights_sha256=weights_sha256), sae.load(path))
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise LiveError(f"The language model {model_name!r} of {sae_id} could not be loaded: {error}") from error
