"""The examples of a feature: dragged ranges, top, intervals, bottom, controls; underlined by ablation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import streamlit as st

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
    "Orange is the activation on that token, in proportion to this feature's maximum. The underline is the ablation "
    "effect: the feature is taken out of the model's MLP at every token and the loss of each token compared; solid "
    "blue where the loss rises without it (the feature helps), dashed violet where it falls. The intervals divide "
    "(0, max] into equal parts, or the firings by rank into equal shares, each half-open (low, high], with examples "
    "drawn uniformly inside; the share of |Δloss| of eleven even intervals is estimated from firings sampled when the "
    "index was built. Controls are tokens on which the feature is silent, drawn uniformly; hard negatives are silent "
    "ones that look alike: its usual tokens, and what its nearest feature fires on. The number beside the dice is the "
    "seed of every draw."
)


@dataclass(frozen=True)
class Sampling:
    """How examples are drawn: tokens around, the seed, the intervals, and ranges of activation and of logit weight."""

    before: int
    after: int
    seed: int
    n_intervals: int = data.N_INTERVALS
    by_rank: bool = False
    one_per_context: bool = True
    acts: tuple[float, float] | None = None
    weights: tuple[float, float] | None = None


def show(page: Page, rows: np.ndarray, values: np.ndarray) -> None:
    """Draws the examples, then fills in what ablation does to them."""
    sampling = _settings()
    groups = groups_of(page, rows, values, sampling)
    key = f"{page.entry.id}:{page.feature}:{sampling}:{page.index.kept_tokens}"
    legend = st.empty()
    legend.caption("Orange: activation.")
    draw_examples(groups, float(values.max()), bos=page.index.attributes.get("bos"), key="examples", effects_key=key)
    _underline(page, rows, values, groups, key, legend)


def _settings() -> Sampling:
    title, length, picked, seed, more = st.columns([0.13, 0.33, 0.2, 0.16, 0.18], vertical_alignment="center")
    title.caption("Examples", help=HELP)
    window = length.segmented_control(
        "Text around",
        list(CONTEXTS),
        default="medium",
        key="around",
        bind="query-params",
        label_visibility="collapsed",
        required=True,
    )
    acts = picked.text_input(
        "Activations from … to",
        key="range",
        bind="query-params",
        label_visibility="collapsed",
        max_chars=40,
        placeholder="range, as 1.5–3",
        help="Drag over the histogram, or type two activations.",
    )
    draw = seed.number_input(
        "Draw", 0, 9999, 0, key="draw", bind="query-params", label_visibility="collapsed", icon=":material/casino:"
    )
    with more.popover("Sampling", icon=":material/tune:", width="stretch"):
        division = st.selectbox(
            "Intervals by",
            DIVISIONS,
            key="division",
            bind="query-params",
            help="activation: of equal width. rank: with as many firings each.",
        )
        count = st.number_input("Intervals", 1, 20, data.N_INTERVALS, key="intervals", bind="query-params")
        single = st.toggle(
            "One example a context",
            value=True,
            key="single",
            bind="query-params",
            help="Top and bottom: off shows every firing, also several of one text.",
        )
        weights = st.text_input(
            "Followed by a token with logit weight from … to",
            key="weights",
            bind="query-params",
            max_chars=40,
            placeholder="as 0.5…1.2",
            help="Drag over the histogram of logit weights, or type two numbers.",
        )
    return Sampling(
        *CONTEXTS[str(window)],
        int(draw),
        int(count),
        division == "rank",
        bool(single),
        parse_range(acts or ""),
        parse_range(weights or ""),
    )


def parse_range(text: str) -> tuple[float, float] | None:
    """Two numbers in order, from what was dragged or typed; None for anything else."""
    found = re.fullmatch(rf"\s*{NUMBER}\s*(?:[-–—…,]|\s)\s*{NUMBER}\s*", text)
    low, high = sorted(map(float, found.groups())) if found else (0.0, 0.0)
    return (low, high) if low < high < float("inf") else None


def groups_of(page: Page, rows: np.ndarray, values: np.ndarray, how: Sampling) -> list[Group]:
    """Every group of examples, in the order of the page."""
    index, seed = page.index, how.seed

    def around(wanted: np.ndarray) -> list[data.Example]:
        return data.examples(index, rows, values, wanted, before=how.before, after=how.after)

    groups = []
    if how.acts is not None:
        drawn, n = data.rows_in_range(rows, values, *how.acts, N_RANGE, seed)
        note = f"{n:,} firings in ({how.acts[0]:.3g}, {how.acts[1]:.3g}], {len(drawn)} drawn"
        groups.append(Group("Your range", note, around(drawn), "no firing lies in this range"))
    if how.weights is not None:
        drawn, note = _before_tokens(page, rows, values, how.weights, seed)
        groups.append(Group("Your logit weights", note, around(drawn), "no firing is followed by one of them"))
    single = how.one_per_context
    top = data.top_rows(rows, values, N_TOP, index.seq_len, one_per_context=single)
    groups.append(Group("Top activations", f"max {values.max():.3f}", around(top)))
    groups += [
        Group(title, note, around(wanted), "no firing lies in this interval")
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
            "silent on a token it often fires on",
            around(alike),
            "it fires on every one of its five commonest tokens",
        )
    )
    nearest, strong = data.neighbour_rows(index, page.feature, rows, N_HARD, seed)
    if nearest >= 0:
        note = f"silent where {nearest:,}, its nearest direction, fires strongly"
        groups.append(Group("Hard negatives: its neighbour", note, around(strong), "it fires wherever that one does"))
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
        of_loss = "" if loss is None else f" · {loss:.1%} of |Δloss|"
        note = f"({each.low:.2f}, {each.high:.2f}] · {each.count:,} firings, {each.share:.2%} of all{of_loss}"
        named.append((f"{'Rank interval' if how.by_rank else 'Interval'} {len(found) - i}", note, each.rows))
    return named


def _before_tokens(
    page: Page, rows: np.ndarray, values: np.ndarray, bounds: tuple[float, float], seed: int
) -> tuple[np.ndarray, str]:
    """Firings that a token in the dragged range of logit weights follows, and what is said of them."""
    try:
        wanted = tokens_in_range(page.entry, page.feature, *bounds)
    except ValueError as error:  # LiveError, or a model that cannot be hooked there
        return rows[:0], f"The logit weights of single tokens need the model: {error}"
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
        loaded = live.load(page.entry)
        found = effects(
            loaded,
            page.index,
            page.feature,
            rows,
            values,
            list(chain.from_iterable(g.examples for g in groups)),
            hook_point=str(page.index.attributes["hook_point"]),
            tick=lambda: legend.caption("Orange: activation. Ablating …"),
        )
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
