"""The examples of a feature that another tool dumped: its own groups of texts, nothing drawn or counted by us."""

from __future__ import annotations

from itertools import chain

import streamlit as st

from browser import dumps
from browser.components import Group, draw_effects, draw_examples
from browser.state import Page
from browser.views.feature_examples import CONTEXTS

HELP = (
    "This dictionary was imported from feature pages, which hold samples of the firings and not all of them. The "
    "groups are the dump's own, in its order. Intervals, controls, precision, recall and specificity "
    "would need every firing, so they are not shown. Underlines are the ablation losses of the dump, where "
    "it has them: solid blue where the loss rises without the feature, dashed violet where it falls."
)


def show(page: Page) -> None:
    """Draws the groups, underlined where the dump says what ablation does."""
    title, length = st.columns([0.5, 0.5], vertical_alignment="center")
    title.caption("Samples of the dump, not all firings", help=HELP)
    window = length.segmented_control(
        "Text around",
        list(CONTEXTS),
        default="medium",
        key="around",
        bind="query-params",
        label_visibility="collapsed",
        required=True,
    )
    before, after = CONTEXTS[str(window)]
    found = dumps.groups(page.index, page.feature, before=before, after=after)
    groups = [
        Group(name, f"{n:,} text{'s' if n != 1 else ''}" + (f", {len(shown)} shown" if len(shown) < n else ""), shown)
        for name, n, shown in found
    ]
    largest = max((float(e.acts.max()) for g in groups for e in g.examples), default=1.0)
    key = f"{page.entry.id}:{page.feature}:{window}"
    draw_examples(groups, largest or 1.0, bos=None, key="examples", effects_key=key)
    effects = dumps.effects(page.index, list(chain.from_iterable(group.examples for group in groups)))
    if effects.at:
        draw_effects(groups, effects, lambda token: [], effects_key=key)
