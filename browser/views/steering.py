"""Steering: the same prompt continued twice with the same randomness, once with an edit."""

from __future__ import annotations

import html
from typing import Any

import streamlit as st

from browser import charts, data, live, state
from browser.components import Line, draw_line
from browser.live import Live, LiveError
from browser.live.steering import MAX_NEW_TOKENS, MODES, steer
from browser.state import Page
from browser.tokens import label, pieces

PROMPT = "In the morning"
HELP = {
    "mode": "The edit is made in delta form, x + (v − a)·decoder, at every position: set pins the "
    "activation a to v, add raises it by v, scale multiplies it by the factor, ablate takes it to "
    "0. What the dictionary does not explain of x stays in place.",
    "value": "For set and add in multiples of the feature's largest activation in the index, so "
    "that strengths compare between features; for scale a plain factor; ablate needs none.",
    "seed": "Both columns draw from the same random stream, so they differ only where the edit "
    "changed the distribution.",
    "kl": "KL(steered ‖ base) of the next-token distributions at each new token, both given the steered text so far.",
}


def show(page: Page) -> None:
    """Draws the form and the two continuations."""
    st.html(_facts(page))
    try:
        loaded = live.load(page.entry)
    except LiveError as error:
        state.explain("Steering needs the model", str(error))
        return
    asked = _form()
    if asked is not None:
        _generate(page, loaded, asked)
    found = st.session_state.get("steered")
    if found is not None and found["entry"] == page.entry.id:
        _compare(page, found)


def _facts(page: Page) -> str:
    """The feature in a line: its number, maximum, density and what it fires on."""
    stats, feature = page.index.stats, page.feature
    top = int(stats["top_token"][feature])
    facts = {
        "max": [f"{stats['max'][feature]:.3f}"],
        "density": [f"{data.density(page.index)[feature]:.3g}"],
        "fires most on": [label(page.index.token_bytes(top)) if top >= 0 else "nothing: dead"],
    }
    if page.index.has("logits/top_id"):
        ids = page.index.panel("logits/top_id", feature)[:5].tolist()
        facts["raises"] = [label(page.index.token_bytes(i)) for i in ids]
    cells = "".join(
        # bdi: a right-to-left token does not turn its neighbours round
        f"<div><span>{name}</span>" + " ".join(f"<bdi>{html.escape(t)}</bdi>" for t in texts) + "</div>"
        for name, texts in facts.items()
    )
    title = f'<div class="mono-title">Steer feature {feature:,}</div>'
    return f'<div class="mono-facts">{title}{cells}</div>'


def _form() -> dict[str, Any] | None:
    """The settings when Generate was pressed."""
    with st.form("steer", border=True, enter_to_submit=False):
        prompt = st.text_area(
            "Prompt",
            PROMPT,
            key="prompt",
            bind="query-params",
            max_chars=live.MAX_PROMPT,
            height=84,
        )
        mode, value, seed, count, go = st.columns([0.32, 0.18, 0.18, 0.17, 0.15], vertical_alignment="bottom")
        mode_now = mode.segmented_control(
            "Edit",
            list(MODES),
            default="set",
            required=True,
            key="mode",
            bind="query-params",
            help=HELP["mode"],
        )
        value_now = value.number_input(
            "Value, × max", -50.0, 50.0, 5.0, 0.5, key="value", bind="query-params",
            help=HELP["value"],
        )  # fmt: skip
        seed_now = seed.number_input("Seed", 0, 2**31 - 1, 0, key="seed", bind="query-params", help=HELP["seed"])
        count_now = count.number_input("New tokens", 1, MAX_NEW_TOKENS, 48, key="new", bind="query-params")
        pressed = go.form_submit_button("Generate", type="primary", width="stretch")
    if not pressed:
        return None
    return {
        "prompt": prompt,
        "mode": str(mode_now),
        "value": float(value_now),
        "seed": int(seed_now),
        "new_tokens": int(count_now),
    }


def _generate(page: Page, loaded: Live, asked: dict[str, Any]) -> None:
    """Runs the model, showing both texts as they grow; the result is kept for later runs."""
    st.session_state.pop("steered", None)
    place = st.empty()
    with place.container():
        progress = st.progress(0.0)
        base, steered = (column.empty() for column in st.columns(2, gap="medium"))
    result = None
    try:
        maxima = page.index.stats["max"]
        for result in steer(loaded, feature=page.feature, feature_max=maxima, **asked):
            progress.progress(len(result.base_ids) / asked["new_tokens"])
            base.text(result.base_text)
            steered.text(result.steered_text)
    except ValueError as error:  # LiveError, and what sae.steering refuses
        place.empty()
        state.explain("Nothing was generated", str(error))
        return
    place.empty()
    st.session_state["steered"] = {
        "entry": page.entry.id,
        "feature": page.feature,
        "asked": asked,
        "result": result,
    }


def _compare(page: Page, found: dict[str, Any]) -> None:
    result, asked = found["result"], found["asked"]
    first = result.first_divergence
    edit = {
        "set": "set to {:g} × max",
        "add": "raised by {:g} × max",
        "scale": "scaled by {:g}",
        "ablate": "ablated",
    }[asked["mode"]].format(asked["value"])
    left, right = st.columns(2, gap="medium")
    with left:
        _column(page, "Base", f"seed {asked['seed']}", result, result.base_ids, "base")
    with right:
        title = f"Steered: feature {found['feature']} {edit}"
        note = "the same text" if first is None else f"differs from new token {first + 1} on"
        _column(page, title, note, result, result.steered_ids, "steered")
    if result.kl:
        st.caption("Divergence from the base model, nats", help=HELP["kl"])
        st.altair_chart(charts.divergence_chart([float(k) for k in result.kl]), key="kl")
    st.html('<i id="steered-done"></i>')


def _column(page: Page, title: str, note: str, result: Any, new_ids: list[int], key: str) -> None:
    prompt_ids = list(result.prompt_ids)
    if prompt_ids and prompt_ids[0] == page.index.attributes.get("bos"):
        prompt_ids = prompt_ids[1:]
    ids = [*prompt_ids, *new_ids]
    first = result.first_divergence
    draw_line(
        title,
        note,
        Line(
            ids,
            pieces([page.index.token_bytes(i) for i in ids]),
            dim=len(prompt_ids),
            first=None if first is None else len(prompt_ids) + first,
        ),
        key=f"text-{key}",
    )
