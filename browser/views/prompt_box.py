"""The prompt and the chosen token, which Microscope, Steering and Attention share with each other and with the URL."""

from __future__ import annotations

import streamlit as st

from browser import live
from browser.live.prompts import FORMS, Prompt

PROMPT = "In the morning"
FORM_HELP = (
    "How the text is read. Text: special tokens in it are spelt out. Special tokens: <|im_start|> and the like are one "
    "token. Chat: a user's message in the model's own chat format, up to where its reply begins."
)


def prompt_box(*, height: int = 84) -> Prompt:
    """Draws the box and how it is read; returns both."""
    text = st.text_area("Prompt", PROMPT, key="prompt", bind="query-params", max_chars=live.MAX_PROMPT, height=height)
    form = st.segmented_control(
        "Read as",
        list(FORMS),
        format_func=FORMS.__getitem__,
        default="text",
        required=True,
        key="form",
        bind="query-params",
        help=FORM_HELP,
        label_visibility="collapsed",
    )
    return Prompt(text, str(form))


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
