"""The prompt and the chosen token, which Microscope, Steering and Attention share with each other and with the URL."""

from __future__ import annotations

import streamlit as st

from browser import live

PROMPT = "In the morning"


def prompt_box(*, height: int = 84) -> str:
    """Draws the box; returns the prompt."""
    return st.text_area("Prompt", PROMPT, key="prompt", bind="query-params", max_chars=live.MAX_PROMPT, height=height)


def position_box(n_tokens: int) -> int:
    """The position of the chosen token; the last one until another is chosen."""
    given = st.session_state.get("at")
    if isinstance(given, int) and given >= n_tokens:  # the text became shorter
        st.session_state["at"] = None
    found = st.number_input(
        "Token",
        0,
        max(1, n_tokens - 1),
        None,
        key="at",
        bind="query-params",
        placeholder="the last",
        help="Position of the chosen token. Clicking a token of the table sets it too.",
    )
    return n_tokens - 1 if found is None else min(int(found), n_tokens - 1)
