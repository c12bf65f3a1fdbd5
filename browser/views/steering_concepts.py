"""The concepts that Steering can erase: those that `sae lens erase` has measured on the dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from browser import state
from browser.live import steering as run
from browser.markup import facts, source_line
from browser.state import Page
from browser.views import lens_parts

HELP = (
    "x → x − P (x − mean): the smallest linear change of x after which no linear probe can tell the concept (LEACE), "
    "as `sae lens erase` found it, at every position but BOS, after the edits of features. Beside the steered text "
    "stands one in which a random subspace of equal rank is removed."
)
MEASURES = {
    "probe_accuracy": ("probe", "before"),
    "delta_loss_concept": ("Δloss, concept", None),
    "delta_loss_others": ("Δloss, others", None),
}


def show(page: Page, erasers: Mapping[str, Path], erased: Sequence[Any], text: str) -> None:
    """Lets the reader choose concepts, and says what erasing each of them was measured to do."""
    if not erasers:
        command = lens_parts.dictionary_command(page, "erase", "--concept", "DOMAIN")
        st.html(source_line(f"No concept can be erased yet. For a domain of the text, run: {command}"))
        return
    chosen = [each.name for each in erased if not each.is_control]
    key = f"erased-{text}"  # a new box for each text, so that it shows what the text says

    def changed() -> None:
        kept = [part for part in text.replace(",", " ").split() if not part.startswith(run.ERASE)]
        state.set_edits(" ".join([*kept, *(f"{run.ERASE}{name}" for name in st.session_state[key])]))

    st.multiselect(
        "Erase concepts", sorted(erasers), default=chosen, key=key, on_change=changed, placeholder="none", help=HELP
    )
    for name in chosen:
        result = lens_parts.read(erasers[name])
        if result is not None:
            st.html(facts(_measured(result), name))


def _measured(result: Any) -> dict[str, str]:
    """Each measure of the result beside the same of a random subspace."""
    found = {"rank": str(result.about.get("rank", "?"))}
    for measure, (title, before) in MEASURES.items():
        figures = result.measures.get(measure)
        if figures is None:
            continue
        beside = [f"{figures.controls[before].value:.2f} before"] if before in figures.controls else []
        if "random_subspace" in figures.controls:
            beside.append(f"{figures.controls['random_subspace'].value:.2f} random subspace")
        found[title] = f"{figures.figure.value:.2f} ({', '.join(beside)})"
    return found
