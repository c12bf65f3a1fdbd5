"""One prompt through model and dictionary, within the app's limits: for the pages Microscope and Attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st

from browser.data import SaeEntry
from browser.live import MAX_PROMPT, Live, LiveError

MAX_PROMPT_TOKENS = 256
KEPT_PROMPTS = 24


FORMS = {"text": "Text", "special": "Special tokens", "chat": "Chat"}


@dataclass(frozen=True)
class Prompt:
    """What was typed, and how it is read: one of `FORMS`."""

    text: str
    form: str = "text"

    @classmethod
    def of(cls, given: Prompt | str) -> Prompt:
        """A prompt as it is; a string as plain text."""
        return cls(given) if isinstance(given, str) else given

    def asked(self) -> dict[str, Any]:
        """The arguments `prompt` and `special_tokens` of `sae.steer` and `LanguageModel.encode_prompt`."""
        messages = [{"role": "user", "content": self.text}]
        return {"prompt": messages if self.form == "chat" else self.text, "special_tokens": self.form == "special"}


def check_prompt(prompt: str) -> None:
    """Raises LiveError for an empty or too long prompt."""
    if not prompt.strip():
        raise LiveError("The prompt is empty: write a few words.")
    if len(prompt) > MAX_PROMPT:
        raise LiveError(f"The prompt has {len(prompt):,} characters; at most {MAX_PROMPT:,}.")


def encode(live: Live, prompt: Prompt | str) -> list[int]:
    """Token ids of a prompt, starting with BOS if the model has one.

    Raises LiveError if it is empty or too long, or a chat message that the model has no format for.
    """
    prompt = Prompt.of(prompt)
    check_prompt(prompt.text)
    try:
        ids: list[int] = live.model.encode_prompt(**prompt.asked())
    except ValueError as error:
        raise LiveError(str(error)) from error
    most = min(MAX_PROMPT_TOKENS, live.model.context_tokens)
    if len(ids) > most:
        raise LiveError(
            f"The prompt has {len(ids):,} tokens; at most {most:,}. The limit is the model's context, or "
            f"{MAX_PROMPT_TOKENS} tokens on this page."
        )
    return ids


def hook_point(entry: SaeEntry) -> str:
    """The hook point of the dictionary. Raises LiveError if its configuration has none."""
    found = entry.config.get("hook_point")
    if not isinstance(found, str):
        raise LiveError(f"The config.json of {entry.id} names no hook_point, so no prompt can be run through it.")
    return found


def inspect(live: Live, entry: SaeEntry, ids: list[int]) -> Any:
    """`sae.interventions.attribution.inspect`, cached for the last prompts."""
    weights = (entry.path / "sae.safetensors").stat().st_mtime_ns
    return _inspect(live, str(entry.path), weights, live.model.weights_sha256, tuple(ids), hook_point(entry))


@st.cache_resource(max_entries=KEPT_PROMPTS, show_spinner=False)
def _inspect(_live: Live, sae: str, weights: int, model: str, ids: tuple[int, ...], hook: str) -> Any:
    from sae.interventions.attribution import inspect

    return inspect(_live.model, _live.sae, ids, hook_point=hook)


def activations(found: Any, feature: int, n_tokens: int) -> np.ndarray:
    """Activations [n_tokens] of one feature, from the result of `inspect`."""
    acts = np.zeros(n_tokens)
    own = np.asarray(found.features) == feature
    acts[np.asarray(found.positions)[own]] = np.asarray(found.acts)[own]
    return acts


def attribute(live: Live, entry: SaeEntry, ids: list[int], position: int, token: int) -> Any:
    """`sae.interventions.attribution.attribute`. Raises LiveError for an unknown position or token."""
    from sae.interventions.attribution import attribute

    try:
        return attribute(live.model, live.sae, ids, position=position, token=token, hook_point=hook_point(entry))
    except ValueError as error:
        raise LiveError(str(error)) from error


def predictions(live: Live, ids: list[int], n: int) -> list[tuple[int, float]]:
    """The `n` most likely next tokens after `ids`, with their probabilities."""
    from sae.interventions.attribution import predictions

    return predictions(live.model, ids, n)


def patterns(live: Live, entry: SaeEntry, ids: list[int]) -> Any:
    """Attention pattern [head, dst, src] of the hook point's block. Raises LiveError if the model does not give one."""
    from sae.lm import layer_of

    return patterns_of(live, ids, layer_of(hook_point(entry)))


def patterns_of(live: Live, ids: list[int], layer: int) -> Any:
    """Attention pattern [head, dst, src] of a layer. Raises LiveError if the model does not give one."""
    from sae.circuits.attention_paths import patterns

    try:
        return patterns(live.model, ids, layer=layer)
    except ValueError as error:
        raise LiveError(str(error)) from error


def paths(live: Live, entry: SaeEntry, ids: list[int], *, feature: int, position: int) -> Any:
    """`sae.circuits.attention_paths.paths`. Raises LiveError for an unsupported model."""
    from sae.circuits.attention_paths import paths

    try:
        return paths(live.model, live.sae, ids, feature=feature, position=position, hook_point=hook_point(entry))
    except ValueError as error:
        raise LiveError(str(error)) from error
