"""Steering: one prompt continued with the same random numbers, without and with features changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from browser import charts, lens_results, live, state, steering_charts
from browser.components import Line, draw_line
from browser.live import Live, LiveError
from browser.live import steering as run
from browser.markup import explain, heading
from browser.state import Page
from browser.tokens import label, pieces
from browser.views import steering_concepts
from browser.views.prompt_box import prompt_box

HELP = {
    "edits": "How the feature's activation a is changed, at every position: x + Σ (v − a) · decoder direction. set: v "
    "is the value. add: v = a + value. scale: v = value · a. ablate: v = 0. The part of x that the dictionary does "
    "not explain stays. Values of set and add are multiples of the feature's largest (max) or 99th-percentile (p99) "
    "activation in the index, so strengths can be compared between features. Where active: only at positions where "
    "the feature fires by itself.",
    "spec": "The same table as text, FEATURE:MODE[:VALUE][:p99][:active] separated by spaces, as in the address of "
    "this page and in `sae steer --edit`. erase:CONCEPT erases a concept.",
    "seed": "All texts use the same random numbers, so they differ only where an edit changed the distribution.",
    "sweep": "One text per factor (×0, ×1, ×2, ×5, ×10) on the values of all edits. It does not change ablate.",
    "pinned": "Pinned feature sampling of Bricken et al. 2023: the prompt 1,2,…,10, with the chosen feature set to its "
    "largest activation in the index at every position.",
    "kl": "KL(steered ‖ base) = Σ p_steered · log(p_steered / p_base) at each new token, both given the steered text "
    "so far.",
    "surprisal": "−log p of each new token under the base model, in nats, for the base text and the steered text.",
    "next": "Next-token probabilities after the prompt, at temperature 1, without and with the edits.",
}
DEFAULT_VALUE = 5.0


def show(page: Page) -> None:
    """Draws the steering set, the settings and the texts."""
    try:
        loaded = live.load(page.entry, transcoders=True)
    except LiveError as error:
        explain("Steering needs the model", str(error))
        return
    left, right = st.columns([0.52, 0.48], gap="medium")
    with left:
        erasers = lens_results.erasures(page.entry)
        edits = _steering_set(page, erasers)
    with right:
        asked = _settings()
    if edits is not None and asked is not None:
        _generate(page, loaded, edits, asked | {"control": run.control_of(edits, erasers)})
    found = st.session_state.get("steered")
    if found is not None and found["entry"] == page.entry.id:
        _results(page, loaded, found)


# --- the edits -------------------------------------------------------------------------------------------------------


def _steering_set(page: Page, erasers: Mapping[str, Path]) -> list[Any] | None:
    """The edits, as a table and as text in the URL; None if the text cannot be read."""
    head, add = st.columns([0.62, 0.38], vertical_alignment="bottom")
    with head:
        heading("Steering set")
    add.button(
        f"Add feature {page.feature:,}",
        icon=":material/add:",
        on_click=state.add_edit,
        args=(page.feature,),
        width="stretch",
    )
    place = st.container()  # the table is above the text that it is made from
    text = st.text_input(
        "Edits as text",
        key=state.EDITS,
        bind="query-params",
        help=HELP["spec"],
        max_chars=600,
        placeholder=f"{page.feature}:set:5   7:ablate   9:add:2:p99:active",
    )
    with place:
        try:
            edits = run.parse(text, erasers)
        except LiveError as error:
            explain("The steering set cannot be read", str(error))
            return None
        _table(page, [each for each in edits if not run.is_erasure(each)], text)
    steering_concepts.show(page, erasers, [each for each in edits if run.is_erasure(each)], text)
    return edits


def _table(page: Page, edits: list[Any], text: str) -> None:
    frame = pd.DataFrame(  # with explicit types, because it may have no rows
        {
            "feature": pd.array([e.feature for e in edits], dtype="Int64"),
            "fires on": pd.array([_fires_on(page, e.feature) for e in edits], dtype="string"),
            "mode": pd.array([e.mode for e in edits], dtype="string"),
            "value": np.array([e.value if e.mode != "ablate" else np.nan for e in edits], np.float64),
            "unit": pd.array([e.unit for e in edits], dtype="string"),
            "where active": np.array([e.only_active for e in edits], np.bool_),
        }
    )
    key = f"edits-table-{text}"  # a new table for each text, so that no change is applied twice

    def changed() -> None:
        erased = [part for part in text.replace(",", " ").split() if part.startswith(run.ERASE)]
        state.set_edits(" ".join([_as_text(page, frame, st.session_state[key]), *erased]).strip())

    column = st.column_config
    st.data_editor(
        frame,
        key=key,
        on_change=changed,
        num_rows="dynamic",
        hide_index=True,
        height=min(36 * (len(frame) + 2), 250),
        disabled=["fires on"],
        column_config={
            "feature": column.NumberColumn("feature", min_value=0, max_value=page.index.d_sae - 1, step=1, width=70),
            "fires on": column.TextColumn("fires on", width=110),
            "mode": column.SelectboxColumn(
                "mode", options=list(run.MODES), default="set", width=80, help=HELP["edits"]
            ),
            "value": column.NumberColumn("value", min_value=-100.0, max_value=100.0, default=DEFAULT_VALUE, width=64),
            "unit": column.SelectboxColumn("unit", options=list(run.UNITS), default="max", width=64),
            "where active": column.CheckboxColumn("where active", default=False, width=92),
        },
    )


def _fires_on(page: Page, feature: int) -> str:
    return state.token_label(page.index, feature) if feature < page.index.d_sae else "no such feature"


def _as_text(page: Page, frame: pd.DataFrame, changes: dict[str, Any]) -> str:
    """The edits of the table after the user's changes; a new row without a feature gets the page's."""
    rows = frame.to_dict("records")
    for number, cells in changes.get("edited_rows", {}).items():
        rows[int(number)] |= cells
    deleted = set(changes.get("deleted_rows", []))
    kept = [row for number, row in enumerate(rows) if number not in deleted] + changes.get("added_rows", [])
    found = []
    for row in kept:
        feature, value = row.get("feature"), row.get("value")
        found.append(
            run.edit(
                page.feature if feature is None or pd.isna(feature) else int(feature),
                str(row.get("mode") or "set"),
                DEFAULT_VALUE if value is None or pd.isna(value) else float(value),
                str(row.get("unit") or "max"),
                bool(row.get("where active") or False),
            )
        )
    return " ".join(str(e) for e in found)


# --- the settings ----------------------------------------------------------------------------------------------------


def _settings() -> dict[str, Any] | None:
    """The settings if Generate was pressed, else None."""
    prompt = prompt_box(height=76)
    seed, count, temperature, mode = st.columns([0.22, 0.22, 0.24, 0.32], vertical_alignment="bottom")
    seed_now = seed.number_input("Seed", 0, 2**31 - 1, 0, key="seed", bind="query-params", help=HELP["seed"])
    count_now = count.number_input("New tokens", 1, run.MAX_NEW_TOKENS, 48, key="new", bind="query-params")
    warmth = temperature.number_input("Temperature", 0.0, 5.0, 1.0, 0.1, key="temperature", bind="query-params")
    sweep = mode.toggle("Sweep ×0 … ×10", key="sweep", bind="query-params", help=HELP["sweep"])
    go, pinned = st.columns(2)
    pressed = go.button("Generate", type="primary", width="stretch", shortcut="Ctrl+Enter")
    pinned.button("The paper's pinned sampling", width="stretch", help=HELP["pinned"], on_click=_pin)
    if not (pressed or st.session_state.pop("pinned", False)):
        return None
    try:
        generation = run.generation(int(seed_now), int(count_now), float(warmth))
    except LiveError as error:
        explain("Nothing was generated", str(error))
        return None
    return {"prompt": prompt, "factors": list(run.SWEEP) if sweep else [1.0], "generation": generation}


def _pin() -> None:
    """Sets the paper's prompt, and the chosen feature alone at its maximum."""
    state.set_edits(f"{st.session_state['feature']}:set:1")
    st.session_state["prompt"] = run.PINNED_PROMPT
    st.session_state["form"] = "text"
    st.session_state["pinned"] = True


def _generate(page: Page, loaded: Live, edits: list[Any], asked: dict[str, Any]) -> None:
    """Runs the model and shows the texts as they grow; the result stays for later runs of the page."""
    st.session_state.pop("steered", None)
    stats = page.index.stats
    units = {"feature_max": stats["max"], "feature_p99": stats["p99"]}
    place = st.empty()
    with place.container():
        progress = st.progress(0.0)
        base, steered = (column.empty() for column in st.columns(2, gap="medium"))
    rows: list[Any] = []
    try:
        for rows in run.sweep(loaded, edits=edits, units=units, **asked):
            progress.progress(len(rows[0].base_ids) / asked["generation"].max_new_tokens)
            base.text(rows[0].base_text)
            steered.text("\n\n".join(row.steered_text for row in rows))
        following = run.next_tokens(loaded, rows[0].prompt_ids, edits, n=10, units=units)
    except ValueError as error:  # LiveError, or an error of sae.interventions.steering
        place.empty()
        explain("Nothing was generated", str(error))
        return
    place.empty()
    st.session_state["steered"] = {
        "entry": page.entry.id,
        "path": str(page.entry.path),
        "edits": edits,
        "asked": {name: value for name, value in asked.items() if name != "control"},
        "rows": rows[: len(asked["factors"])],
        "control": rows[-1] if asked["control"] else None,
        "next": following,
    }


# --- the results -----------------------------------------------------------------------------------------------------


def _results(page: Page, loaded: Live, found: dict[str, Any]) -> None:
    if len(found["rows"]) == 1:
        _side_by_side(page, found)
    else:
        _sweep_grid(page, found)
    left, right = st.columns(2, gap="medium")
    factor = found["asked"]["factors"][-1]
    strongest = "" if len(found["rows"]) == 1 else f" of the text at × {factor:g}"
    with left:
        st.caption("Next token after the prompt", help=HELP["next"])
        st.altair_chart(_next_chart(page, found["next"]), key="next-tokens")
    with right:
        row = found["rows"][-1]
        st.caption(f"Surprisal under the base model, nats{strongest}", help=HELP["surprisal"])
        st.altair_chart(steering_charts.surprisal_chart(row.base_surprisal, row.steered_surprisal), key="surprisal")
        if any(row.kl):
            st.caption(f"KL(steered ‖ base), nats{strongest}", help=HELP["kl"])
            st.altair_chart(charts.divergence_chart([float(k) for k in row.kl]), key="kl")
    with st.expander("Copy as a command or as Python"):
        asked = {"path": found["path"], "edits": found["edits"], **found["asked"]}
        st.code(run.as_command(**asked), language="bash")
        st.code(run.as_python(**asked), language="python")


def _side_by_side(page: Page, found: dict[str, Any]) -> None:
    (row,) = found["rows"]
    first = row.first_divergence
    left, right, *more = st.columns(2 if found["control"] is None else 3, gap="medium")
    with left:
        note = f"seed {found['asked']['generation'].seed} · perplexity {row.base_perplexity:.1f}"
        _column(page, "Base", note, row, row.base_ids, "base")
    with right:
        parts = "same text as base" if first is None else f"differs from new token {first + 1} on"
        title = "Steered: " + ", ".join(_in_words(e) for e in found["edits"])
        note = f"{parts} · perplexity {row.steered_perplexity:.1f} under the base model"
        _column(page, title, note if not more else _note(row), row, row.steered_ids, "steered")
    for column in more:
        with column:
            _control(page, found["control"])


def _control(page: Page, row: Any) -> None:
    """The text of the same edits with random subspaces of equal rank in place of what is erased."""
    _column(page, "Control: a random subspace of equal rank", _note(row), row, row.steered_ids, "control")


def _note(row: Any) -> str:
    first = row.first_divergence
    parts = "same text as base" if first is None else f"differs from new token {first + 1} on"
    kl = sum(row.kl) / len(row.kl)
    return f"{parts} · KL {kl:.2f} nats per token · perplexity {row.steered_perplexity:.1f} under the base model"


def _sweep_grid(page: Page, found: dict[str, Any]) -> None:
    base = found["rows"][0]
    note = f"seed {found['asked']['generation'].seed} · perplexity {base.base_perplexity:.1f}"
    _column(page, "Base", note, base, base.base_ids, "base")
    for factor, row in zip(found["asked"]["factors"], found["rows"], strict=True):
        _column(page, f"× {factor:g}", _note(row), row, row.steered_ids, f"x{factor:g}")
    if found["control"] is not None:
        _control(page, found["control"])


def _in_words(e: Any) -> str:
    if run.is_erasure(e):
        return "a random subspace removed" if e.is_control else f"{e.name} erased"
    unit = {"max": "max", "p99": "P99"}[e.unit]
    done = {
        "set": f"set to {e.value:g} × {unit}",
        "add": f"raised by {e.value:g} × {unit}",
        "scale": f"scaled by {e.value:g}",
        "ablate": "ablated",
    }[e.mode]
    return f"{e.feature} {done}" + (" where active" if e.only_active else "")


def _next_chart(page: Page, following: Any) -> Any:
    names = [label(page.index.token_bytes(i)) for i in following.ids]
    return steering_charts.next_token_chart(names, following.base, following.steered)


def _column(page: Page, title: str, note: str, row: Any, new_ids: list[int], key: str) -> None:
    prompt_ids = list(row.prompt_ids)
    if prompt_ids and prompt_ids[0] == page.index.attributes.get("bos"):
        prompt_ids = prompt_ids[1:]
    ids = [*prompt_ids, *new_ids]
    first = row.first_divergence if new_ids is row.steered_ids else None
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
