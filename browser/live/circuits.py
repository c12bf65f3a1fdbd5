"""Features in the circuits of the model: which heads write and read one, which pairs make a head read from a token."""

from __future__ import annotations

from typing import Any

import streamlit as st

from browser.data import SaeEntry
from browser.live import Live, LiveError
from browser.live.prompts import KEPT_PROMPTS, hook_point


def heads_of_feature(live: Live, entry: SaeEntry, feature: int) -> Any:
    """`sae.circuits.feature_heads.heads_of_feature`. Raises LiveError for a model whose weights are not known."""
    stamp = (entry.path / "sae.safetensors").stat().st_mtime_ns
    return _heads(live, str(entry.path), stamp, live.model.weights_sha256, feature, hook_point(entry))


@st.cache_resource(max_entries=32, show_spinner=False)
def _heads(_live: Live, sae: str, stamp: int, model: str, feature: int, hook: str) -> Any:
    from sae.circuits.feature_heads import heads_of_feature

    try:
        return heads_of_feature(_live.model, _live.sae, feature, hook)
    except ValueError as error:
        raise LiveError(str(error)) from error


def first_reading_layer(entry: SaeEntry) -> int:
    """The first layer whose heads read what the dictionary's features write; it may not exist."""
    from sae.lm import layer_of

    found = hook_point(entry)
    return layer_of(found) + (not found.endswith("hook_resid_pre"))


def layer_of_entry(entry: SaeEntry) -> int:
    """The layer of the dictionary's hook point."""
    from sae.lm import layer_of

    return layer_of(hook_point(entry))


def qk_pairs(live: Live, entry: SaeEntry, ids: list[int], layer: int, head: int, dst: int, src: int) -> Any:
    """`sae.circuits.qk_features.qk_pairs`. Raises LiveError where there is nothing to split, which says why."""
    stamp = (entry.path / "sae.safetensors").stat().st_mtime_ns
    place = (layer, head, dst, src)
    return _pairs(live, str(entry.path), stamp, live.model.weights_sha256, tuple(ids), hook_point(entry), place)


@st.cache_resource(max_entries=KEPT_PROMPTS, show_spinner=False)
def _pairs(
    _live: Live, sae: str, stamp: int, model: str, ids: tuple[int, ...], hook: str, place: tuple[int, int, int, int]
) -> Any:
    from sae.circuits.qk_features import qk_pairs

    layer, head, dst, src = place
    try:
        with _live.model.lock:
            return qk_pairs(_live.model, _live.sae, ids, hook_point=hook, layer=layer, head=head, dst=dst, src=src)
    except ValueError as error:
        raise LiveError(str(error)) from error
