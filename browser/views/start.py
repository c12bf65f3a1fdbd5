"""The start page: every run below the root with its recipe, size, scores and state; each is a link."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import streamlit as st

from browser import state
from browser.address import link
from browser.components.run_list import Cell, Column, Run, draw_runs
from browser.data import SaeEntry
from browser.markup import facts
from browser.runs import Summary
from browser.style import BLUE, GREEN, ORANGE, VIOLET

HELP = {
    "dictionary": "Path under the root. It opens in place, or in a new tab like any link.",
    "recipe": "Training recipe (sae train --recipe).",
    "size": "d_in: width of the activations. d_sae: number of features.",
    "l0": "Mean number of features with f > 0 per kept held-out token.",
    "score": "(ce_zero − ce_sae) / (ce_zero − ce_clean), cross-entropies on held-out text: 1 if the model predicts as "
    "well with the reconstruction as with its own activations, 0 if no better than with zeros in their place.",
    "state": "trained → evaluated (sae eval) → indexed (sae index). Only an indexed dictionary has feature pages. "
    "Stopped: training is unfinished, and its log has not grown for ten minutes.",
}
COLUMNS = [
    Column("Dictionary", HELP["dictionary"]),
    Column("Recipe", HELP["recipe"]),
    Column("d_in → d_sae", HELP["size"], number=True),
    Column("L0", HELP["l0"], number=True),
    Column("CE loss score", HELP["score"], number=True),
    Column("State", HELP["state"]),
]
TONES = {"indexed": GREEN, "evaluated": BLUE, "trained": BLUE, "in training": ORANGE, "just started": ORANGE}
NEXT_STEP = {
    "trained": "Next: sae eval, then sae index.",
    "evaluated": "Next: sae index.",
    "stopped": "Repeat the command it was started with: it continues from the last checkpoint.",
    "imported pages": "Samples from another tool's feature pages, without weights.",
}
NEXT_STEP_OF_CROSSCODER = {**NEXT_STEP, "trained": "Next: sae eval.", "evaluated": ""}  # it has no feature index


def show(root: Path, entries: Mapping[str, SaeEntry], *, in_place: bool = True) -> None:
    """Draws the list. Without `in_place` a click reloads the app, without the settings of the present link."""

    def opened(sae_id: str) -> None:
        state.open_dictionary(sae_id, _first_view(entries[sae_id]))

    st.html(facts({"in": str(root)}, f"{len(entries):,} run{'' if len(entries) == 1 else 's'}"))
    draw_runs(COLUMNS, [_row(each) for each in state.summaries(root)], key="runs", on_open=opened if in_place else None)
    st.caption("A name opens the dictionary. Click a column's head to sort; hover over it for the definition.")


def _first_view(entry: SaeEntry) -> str:
    """Without an index there are no feature pages; training and evaluation are on the page Run."""
    return "features" if entry.has_index else "run"


def _row(found: Summary) -> Run:
    entry = found.entry
    d_in = "?" if found.d_in is None else f"{found.d_in:,}"
    progress = "" if found.progress is None else f", {found.progress:.0%}"
    next_step = (NEXT_STEP_OF_CROSSCODER if entry.is_crosscoder else NEXT_STEP).get(found.state, "")
    tone = TONES.get(found.state, VIOLET)
    cells = [
        Cell(entry.path.name if entry.id == "." else entry.id, entry.id),
        Cell(found.recipe, found.recipe),
        Cell(f"{d_in} → {entry.d_sae:,}", entry.d_sae),
        Cell(_number(found.l0, ".1f"), found.l0),
        Cell(_number(found.ce_loss_score, ".4f"), found.ce_loss_score, share=found.ce_loss_score),
        Cell(found.state + progress, found.state, tone=tone, help=next_step),
    ]
    return Run(entry.id, link(sae=entry.id, view=_first_view(entry).capitalize()), cells)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
