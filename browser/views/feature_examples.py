"""The examples of a feature: a dragged range, top, eleven intervals, bottom, controls; underlined by ablation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
import streamlit as st

from browser import data, live
from browser.components import Group, draw_effects, draw_examples
from browser.live import LiveError
from browser.live.ablation import effects
from browser.state import Page
from browser.tokens import Piece, pieces, plain_markdown

CONTEXTS = {"short": (10, 6), "medium": (22, 12), "whole": (1 << 20, 1 << 20)}
N_TOP, PER_INTERVAL, N_BOTTOM, N_CONTROLS, N_RANGE = 20, 5, 20, 20, 20
HELP = (
    "Orange is the activation on that token, in proportion to this feature's maximum. The underline is the ablation "
    "effect: the feature is taken out of the model's MLP at every token and the loss of each token compared; solid "
    "blue where the loss rises without it (the feature helps), dashed violet where it falls. Top activations show one "
    "example for each context. The intervals divide (0, max] into eleven equal parts, each half-open (low, high], with "
    "examples drawn uniformly inside; their share of |Δloss| is estimated from firings sampled when the index was "
    "built. Controls are tokens on which the feature is silent, drawn uniformly. The number beside the dice is the "
    "seed of every draw."
)


def show(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    """Draws the examples, then fills in what ablation does to them."""
    title, length, picked, seed = st.columns([0.2, 0.36, 0.24, 0.2], vertical_alignment="center")
    title.caption("Examples", help=HELP)
    window = length.segmented_control(
        "Text around", list(CONTEXTS), default="medium", key="around", bind="query-params",
        label_visibility="collapsed", required=True,
    )  # fmt: skip
    wanted = picked.text_input(
        "Activations from … to", key="range", bind="query-params", label_visibility="collapsed", max_chars=40,
        placeholder="range, as 1.5–3", help="Drag over the histogram, or type two activations.",
    )  # fmt: skip
    draw = seed.number_input(
        "Draw", 0, 9999, 0, key="draw", bind="query-params", label_visibility="collapsed", icon=":material/casino:"
    )
    before, after = CONTEXTS[str(window)]
    chosen = parse_range(wanted or "")
    groups = groups_of(page, rows, values, before=before, after=after, seed=int(draw), chosen=chosen)
    key = f"{page.entry.id}:{page.feature}:{window}:{draw}:{chosen}:{page.index.kept_tokens}"
    legend = st.empty()
    legend.caption("Orange: activation.")
    draw_examples(groups, float(values.max()), bos=page.index.attributes.get("bos"), key="examples", effects_key=key)
    st.html(f'<i id="done" data-feature="{page.feature}"></i>')
    _underline(page, rows, values, groups, key, legend)


def parse_range(text: str) -> tuple[float, float] | None:
    """Two numbers in order, from what was dragged or typed; None for anything else."""
    found = re.fullmatch(r"\s*([\d.eE+]+)\s*[-–—…, ]+\s*([\d.eE+]+)\s*", text)
    try:
        low, high = sorted(map(float, found.groups())) if found else (0.0, 0.0)
    except ValueError:
        return None
    return (low, high) if low < high < float("inf") else None


def groups_of(
    page: Page, rows: np.ndarray, values: np.ndarray, *, before: int, after: int, seed: int,
    chosen: tuple[float, float] | None = None,
) -> list[Group]:  # fmt: skip
    """Every group of examples, in the order of the page."""
    index = page.index

    def around(wanted: np.ndarray) -> list[data.Example]:
        return data.examples(index, rows, values, wanted, before=before, after=after)

    groups = []
    if chosen is not None:
        drawn, n = data.rows_in_range(rows, values, *chosen, N_RANGE, seed)
        note = f"{n:,} firings in ({chosen[0]:.3g}, {chosen[1]:.3g}], {len(drawn)} drawn"
        groups.append(Group("Your range", note, around(drawn), "no firing lies in this range"))
    top = data.top_rows(rows, values, N_TOP, index.seq_len)
    groups.append(Group("Top activations", f"max {values.max():.3f}", around(top)))
    found = data.intervals(rows, values, per_interval=PER_INTERVAL, seed=seed)
    losses = data.loss_shares(index, page.feature, [each.count for each in reversed(found)])[::-1]
    for i, (each, loss) in enumerate(zip(found, losses, strict=True)):
        of_loss = "" if loss is None else f" · {loss:.1%} of |Δloss|"
        note = f"({each.low:.2f}, {each.high:.2f}] · {each.count:,} firings, {each.share:.2%} of all{of_loss}"
        groups.append(Group(f"Interval {len(found) - i}", note, around(each.rows), "no firing lies in this interval"))
    bottom = data.bottom_rows(rows, values, N_BOTTOM, index.seq_len)
    groups.append(Group("Bottom activations", "the weakest firing of each of 20 contexts", around(bottom)))
    controls = data.control_rows(index, rows, N_CONTROLS, seed)
    return [*groups, Group("Controls", "random tokens on which it is silent", around(controls))]


def _underline(
    page: Page,
    rows: np.ndarray,
    values: np.ndarray,
    groups: Sequence[Group],
    key: str,
    legend: st.delta_generator.DeltaGenerator,
) -> None:
    try:
        loaded = live.load(page.entry)
        found = effects(
            loaded, page.index, page.feature, rows, values, list(chain.from_iterable(g.examples for g in groups)),
            hook_point=str(page.index.attributes["hook_point"]),
            tick=lambda: legend.caption("Orange: activation. Ablating …"),
        )  # fmt: skip
    except ValueError as error:  # LiveError, or a model that cannot be hooked there
        what = str(error) if isinstance(error, LiveError) else f"The model could not be run: {error}"
        legend.caption(plain_markdown(f"Orange: activation. No ablation underlines: {what}"))
        return

    def shown(token: int) -> list[Piece]:
        return pieces([page.index.token_bytes(token)])[0]

    draw_effects(groups, found, shown, effects_key=key)
    how = "exact, in closed form" if found.exact else "the model run again"
    legend.caption(
        "Orange: activation. Underline: loss of the token without the feature, blue where it rises, dashed violet "
        f"where it falls ({how}; {found.seconds:.1f} s)."
    )
    st.html(f'<i id="ablated" data-feature="{page.feature}"></i>')
