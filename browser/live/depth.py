"""What the lenses read in a prompt, layer by layer: for the page Microscope."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from browser.live import Live, LiveError
from browser.live.prompts import KEPT_PROMPTS

WEIGHT, BIAS = "tuned_weight", "tuned_bias"  # arrays of a result of `sae lens depth`


def logit_lens(live: Live, ids: list[int]) -> Any:
    """`sae.circuits.prompt_depth.read_prompt`. Raises LiveError for a model without a linear path to its logits."""
    return _read(live, live.model.weights_sha256, tuple(ids), None, None)


def tuned_lens(live: Live, ids: list[int], result: Path, arrays: Mapping[str, np.ndarray]) -> Any:
    """The same with the affine maps of a result. Raises LiveError if they do not fit the model."""
    stamp = (str(result), result.stat().st_mtime_ns)
    return _read(live, live.model.weights_sha256, tuple(ids), stamp, arrays)


@st.cache_resource(max_entries=KEPT_PROMPTS, show_spinner=False)
def _read(_live: Live, model: str, ids: tuple[int, ...], stamp: Any, _arrays: Mapping[str, np.ndarray] | None) -> Any:
    import torch

    from sae.circuits.depth import Translator
    from sae.circuits.prompt_depth import read_prompt

    maps = None
    if _arrays is not None:
        weights, biases = (torch.from_numpy(_arrays[name]) for name in (WEIGHT, BIAS))
        maps = [Translator(*each) for each in zip(weights, biases, strict=True)]
    try:
        with _live.model.lock:
            return read_prompt(_live.model, ids, maps)
    except (ValueError, RuntimeError) as error:  # RuntimeError: maps of another width
        raise LiveError(str(error)) from error
