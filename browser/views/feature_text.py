"""One feature on your own text."""

from __future__ import annotations

import numpy as np
import streamlit as st

from browser import live
from browser.components import Group, draw_examples
from browser.data import Example
from browser.live import LiveError, prompts
from browser.markup import explain
from browser.state import Page
from browser.tokens import pieces
from store.common import DocumentRecord


def show(page: Page) -> None:
    """Draws a box for the text, and its tokens coloured by the feature's activation."""
    text = st.text_area("Text", key="try", bind="query-params", max_chars=live.MAX_PROMPT, height=76)
    if not text.strip():
        return
    try:
        loaded = live.load(page.entry)
        ids = prompts.encode(loaded, text)
        found = prompts.inspect(loaded, page.entry, ids)
    except LiveError as error:
        explain("This text cannot be run", str(error))
        return
    acts = prompts.activations(found, page.feature, len(ids))
    largest = float(page.index.stats["max"][page.feature])
    strongest = int(acts.argmax())
    example = Example(
        row=0,
        value=float(acts.max()),
        context=0,
        start=0,
        hit=strongest,
        token_ids=np.array(ids),
        shown=pieces([page.index.token_bytes(i) for i in ids]),
        acts=acts.astype(np.float32),
        document=DocumentRecord("your text", source="", domain="", sha256=""),
    )
    share = f"{acts.max() / largest:.0%} of its maximum in the index" if largest > 0 else "never fires in the index"
    note = f"fires on {int((acts > 0).sum())} of {len(ids)} tokens, at most {acts.max():.3f} ({share})"
    group = Group("Your text", note if acts.any() else f"silent on all {len(ids)} tokens", [example])
    draw_examples([group], largest or 1.0, bos=page.index.attributes.get("bos"), key="tried")
