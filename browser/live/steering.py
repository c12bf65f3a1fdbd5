"""Steering behind its page: `sae.steering` within the app's limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from browser.live import MAX_PROMPT, Live, LiveError

MAX_NEW_TOKENS = 128
MODES = ("set", "add", "scale", "ablate")


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
