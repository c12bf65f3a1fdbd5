"""The logit weights of one feature for the whole vocabulary: its decoder direction · W_U, computed on demand."""

from __future__ import annotations

import numpy as np
import streamlit as st

from browser import live
from browser.data import SaeEntry
from browser.live import Live, prompts


def tokens_in_range(entry: SaeEntry, feature: int, low: float, high: float) -> np.ndarray:
    """Ids of the tokens with a logit weight in (low, high], highest first. Raises LiveError without the model."""
    loaded = live.load(entry, transcoders=True)
    written = entry.config.get("target_hook_point") or prompts.hook_point(entry)
    weights = _weights(loaded, str(entry.path), feature, loaded.model.weights_sha256, written)
    inside = np.flatnonzero((weights > low) & (weights <= high))  # never an id without a token: its weight is nan
    return inside[np.argsort(-weights[inside], kind="stable")]


@st.cache_resource(max_entries=16, show_spinner=False)
def _weights(_live: Live, sae: str, feature: int, model: str, hook: str) -> np.ndarray:
    import torch

    with torch.inference_mode():
        weights: np.ndarray = _live.model.logit_weights(_live.sae.W_dec[feature][None], hook)[0].cpu().numpy()
    return weights
