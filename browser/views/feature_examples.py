"""The examples of a feature: dragged ranges, top, intervals, bottom, controls; underlined by ablation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from browser import data, live
from browser.components import Group, draw_effects, draw_examples
from browser.live import LiveError
from browser.live.ablation import effects
from browser.live.weights import tokens_in_range
from browser.state import Page
from browser.tokens import Piece, label, pieces, plain_markdown

CONTEXTS = {"short": (10, 6), "medium": (22, 12), "whole": (1 << 20, 1 << 20)}
N_TOP, PER_INTERVAL, N_BOTTOM, N_CONTROLS, N_HARD, N_RANGE = 20, 5, 20, 20, 10, 20
DIVISIONS = ["activation", "rank"]
NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
HELP = (
    "Orange: activation on the token / the feature's maximum. Underline: ablation effect, the loss of the token "
    "without the feature − its loss with it, when the feature is removed at every token; solid blue if the loss rises "
    "(the feature helps), dashed violet if it falls. Intervals divide (0, max] into equal parts, or the firings by "
    "rank into equal shares; examples are drawn uniformly from each. The share of |Δloss| is estimated from firings "
    "that were sampled when the index was built. Controls: random tokens on which the feature is silent. Hard "
    "negatives: silent tokens that look similar, either one of its usual tokens or a token on which its nearest "
    "feature fires. The number next to the die is the random seed."
)


@dataclass(frozen=True)
class Sampling:
    """How examples are drawn: tokens around each, seed, intervals, and ranges of activation and of logit weight."""

    before: int
    after: int
    seed: int
    n_intervals: int = data.N_INTERVALS
    by_rank: bool = False
    one_per_context: bool = True
    acts: tuple[float, float] | None = None
    weights: tuple[float, float] | None = None


def show(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    """Draws the examples, then underlines them by the effect of ablation."""
    sampling = _settings()
    groups = groups_of(page, rows, values, sampling)
    key = f"{page.entry.id}:{page.feature}:{sampling}:{page.index.kept_tokens}"
    legend = st.empty()
    legend.caption("Orange: activation.")
    draw_examples(groups, float(values.max()), bos=page.index.attributes.get("bos"), key="examples", effects_key=key)
    if page.entry.has_model:
        _underline(page, rows, values, groups, key, legend)


def choose_text_around(column: DeltaGenerator) -> tuple[int, int]:
    """A control that says how many tokens to show before and after a firing."""
    chosen = column.segmented_control(
        "Text around",
        list(CONTEXTS),
        default="medium",
        key="around",
        bind="query-params",
        label_visibility="collapsed",
        required=True,
    )
    return CONTEXTS[str(chosen)]


def _settings() -> Sampling:
    title, length, picked, seed, more = st.columns([0.13, 0.33, 0.2, 0.16, 0.18], vertical_alignment="center")
    title.caption("Examples", help=HELP)
    text_around = choose_text_around(length)
    acts = picked.text_input(
        "Activations from … to",
        key="range",
        bind="query-params",
        label_visibility="collapsed",
        max_chars=40,
        placeholder="range, e.g. 1.5–3",
        help="Drag over the histogram of activations, or type two numbers.",
    )
    draw = seed.number_input(
        "Seed of the draws",
        0,
        9999,
        0,
        key="draw",
        bind="query-params",
        label_visibility="collapsed",
        icon=":material/casino:",
    )
    with more.popover("Sampling", icon=":material/tune:", width="stretch"):
        division = st.selectbox(
            "Intervals by",
            DIVISIONS,
            key="division",
            bind="query-params",
            help="activation: intervals of equal width. rank: intervals with equally many firings.",
        )
        count = st.number_input("Intervals", 1, 20, data.N_INTERVALS, key="intervals", bind="query-params")
        single = st.toggle(
            "One example per context",
            value=True,
            key="single",
            bind="query-params",
            help="For top and bottom activations. Off: several firings of one context may be shown.",
        )
        weights = st.text_input(
            "Followed by a token with a logit weight from … to",
            key="weights",
            bind="query-params",
            max_chars=40,
            placeholder="e.g. 0.5…1.2",
            help="Drag over the histogram of logit weights, or type two numbers.",
        )
    return Sampling(
        *text_around,
        int(draw),
        int(count),
        division == "rank",
        bool(single),
        parse_range(acts or ""),
        parse_range(weights or ""),
    )


def parse_range(text: str) -> tuple[float, float] | None:
    """The two numbers of a range that was dragged or typed, smaller first; None for anything else."""
    found = re.fullmatch(rf"\s*{NUMBER}\s*(?:[-–—…,]|\s)\s*{NUMBER}\s*", text)
    low, high = sorted(map(float, found.groups())) if found else (0.0, 0.0)
    return (low, high) if low < high < float("inf") else None


def groups_of(page: Page, rows: np.ndarray, values: np.ndarray, how: Sampling) -> list[Group]:
    """All groups of examples, in the order of the page."""
    index, seed = page.index, how.seed
    images = bool((index.rows or {}).get("images"))
    before, after = CONTEXTS["whole"] if images else (how.before, how.after)  # all patches of an image

    def around(wanted: np.ndarray) -> list[data.Example]:
        return data.examples(index, rows, values, wanted, before=before, after=after)

    groups = []
    if how.acts is not None:
        drawn, n = data.rows_in_range(rows, values, *how.acts, N_RANGE, seed)
        note = f"{n:,} firings in ({how.acts[0]:.3g}, {how.acts[1]:.3g}], {len(drawn)} drawn"
        groups.append(Group("Your range", note, around(drawn), "no firing in this range"))
    if how.weights is not None:
        drawn, note = _before_tokens(page, rows, values, how.weights, seed)
        groups.append(Group("Your logit weights", note, around(drawn), "no firing is followed by such a token"))
    single = how.one_per_context
    top = data.top_rows(rows, values, N_TOP, index.seq_len, one_per_context=single)
    groups.append(Group("Top activations", f"max {values.max():.3f}", around(top)))
    groups += [
        Group(title, note, around(wanted), "no firing in this interval")
        for title, note, wanted in _intervals(page, rows, values, how)
    ]
    bottom = data.bottom_rows(rows, values, N_BOTTOM, index.seq_len, one_per_context=single)
    what = f"the weakest firing of each of {N_BOTTOM} contexts" if single else f"the {N_BOTTOM} weakest firings"
    groups.append(Group("Bottom activations", what, around(bottom)))
    controls = data.control_rows(index, rows, N_CONTROLS, seed)
    groups.append(Group("Controls", "random tokens on which it is silent", around(controls)))
    alike = data.same_token_rows(index, rows, N_HARD, seed)
    groups.append(
        Group(
            "Hard negatives: its tokens",
            "silent on a token that it often fires on",
            around(alike),
            "it fires on every occurrence of its five most frequent tokens",
        )
    )
    nearest, strong = data.neighbour_rows(index, page.feature, rows, N_HARD, seed)
    if nearest >= 0:
        note = f"silent where {nearest:,}, its nearest direction, fires strongly"
        groups.append(
            Group(
                "Hard negatives: its neighbour", note, around(strong), "it fires wherever the neighbour fires strongly"
            )
        )
    return groups


def _intervals(page: Page, rows: np.ndarray, values: np.ndarray, how: Sampling) -> list[tuple[str, str, np.ndarray]]:
    found = data.intervals(
        rows, values, per_interval=PER_INTERVAL, seed=how.seed, n=how.n_intervals, by_rank=how.by_rank
    )
    losses: list[float | None] = [None] * len(found)
    if len(found) == data.N_INTERVALS and not how.by_rank:  # the index holds Δloss of these
        losses = data.loss_shares(page.index, page.feature, [each.count for each in reversed(found)])[::-1]
    named = []
    for i, (each, loss) in enumerate(zip(found, losses, strict=True)):
        firings = "firing" if each.count == 1 else "firings"
        of_loss = "" if loss is None else f" · {loss:.1%} of |Δloss|"
        note = f"({each.low:.2f}, {each.high:.2f}] · {each.count:,} {firings}, {each.share:.2%} of all{of_loss}"
        named.append((f"{'Rank interval' if how.by_rank else 'Interval'} {len(found) - i}", note, each.rows))
    return named


def _before_tokens(
    page: Page, rows: np.ndarray, values: np.ndarray, bounds: tuple[float, float], seed: int
) -> tuple[np.ndarray, str]:
    """Firings that are followed by a token in the range of logit weights, and a note about them."""
    try:
        wanted = tokens_in_range(page.entry, page.feature, *bounds)
    except ValueError as error:  # LiveError, or a model that cannot be hooked there
        return rows[:0], f"Logit weights of single tokens need the model: {error}"
    drawn, n = data.rows_before_tokens(page.index, rows, values, wanted, N_RANGE, seed)
    names = "  ".join(label(page.index.token_bytes(i)) for i in wanted[:8].tolist())
    said = f"{len(wanted):,} tokens in ({bounds[0]:.3g}, {bounds[1]:.3g}]: {names}{' …' if len(wanted) > 8 else ''}"
    return drawn, f"{said} · {n:,} firings are followed by one, {len(drawn)} drawn"


def _underline(
    page: Page,
    rows: np.ndarray,
    values: np.ndarray,
    groups: Sequence[Group],
    key: str,
    legend: st.delta_generator.DeltaGenerator,
) -> None:
    try:
        loaded = live.load(page.entry, transcoders=True)
        found = effects(
            loaded,
            page.index,
            page.feature,
            rows,
            values,
            list(chain.from_iterable(g.examples for g in groups)),
            hook_point=str(page.index.attributes.get("target_hook_point") or page.index.attributes["hook_point"]),
            tick=lambda: legend.caption("Orange: activation. Computing the ablation …"),
        )
    except ValueError as error:  # LiveError, or a model that cannot be hooked there
        what = str(error) if isinstance(error, LiveError) else f"The model could not be run: {error}"
        legend.caption(plain_markdown(f"Orange: activation. No ablation underlines: {what}"))
        return

    def shown(token: int) -> list[Piece]:
        return pieces([page.index.token_bytes(token)])[0]

    draw_effects(groups, found, shown, effects_key=key)
    how = "exact, in closed form" if found.exact else "by a second forward pass"
    legend.caption(
        "Orange: activation. Underline: change of the token's loss without the feature; blue if it rises, dashed "
        f"violet if it falls ({how}; {found.seconds:.1f} s)."
    )
