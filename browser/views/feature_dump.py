"""The examples of a feature that another tool dumped: its own groups of texts, nothing drawn or counted by us."""

from __future__ import annotations

from itertools import chain

import streamlit as st

from browser import dumps
from browser.components import Group, draw_effects, draw_examples
from browser.state import Page
from browser.views.feature_examples import choose_text_around

HELP = (
    "This dictionary was imported from feature pages, which hold samples of the firings, not all of them. The groups "
    "and their order are those of the pages. Intervals, controls, precision, recall and specificity need every firing, "
    "so they are not shown. Underlines are the ablation losses in the pages, if any: solid blue if the loss rises "
    "without the feature, dashed violet if it falls."
)


def show(page: Page) -> None:
    """Draws the groups, underlined by the ablation losses that the dump has."""
    title, length = st.columns([0.5, 0.5], vertical_alignment="center")
    title.caption("Samples, not all firings", help=HELP)
    before, after = choose_text_around(length)
    found = dumps.groups(page.index, page.feature, before=before, after=after)
    groups = [
        Group(name, f"{n:,} text{'s' if n != 1 else ''}" + (f", {len(shown)} shown" if len(shown) < n else ""), shown)
        for name, n, shown in found
    ]
    largest = max((float(e.acts.max()) for g in groups for e in g.examples), default=1.0)
    key = f"{page.entry.id}:{page.feature}:{before}"
    draw_examples(groups, largest or 1.0, bos=None, key="examples", effects_key=key)
    effects = dumps.effects(page.index, list(chain.from_iterable(group.examples for group in groups)))
    if effects.at:
        draw_effects(groups, effects, lambda token: [], effects_key=key)
