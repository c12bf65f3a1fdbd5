"""Patching: which part of the model carries the answer of a task, as `sae lens circuit` measured it."""

from __future__ import annotations

import streamlit as st

from browser import lens_results, state
from browser.markup import explain, facts, heading, source_line
from browser.state import Page
from browser.tokens import visible
from browser.views import lens_parts

LENSES = ("circuit", "keys", "facts")
HELP = (
    "LD = logit(answer) − logit(wrong) at the last token, mean over prompts. A share of 0 or 1 is of the difference "
    "between the clean and the corrupt run. A task that the model does not do has no circuit: look at LD first."
)


def show(page: Page) -> None:
    """Draws one saved result about a task: its two prompts, its measures and their controls."""
    found = lens_results.find(page.entry, state.root())
    names = [name for name in found if name.partition("-")[0] in LENSES]
    if not names:
        explain(
            "No patching has been done on this dictionary or its model",
            "The lens circuit swaps parts of a run for those of another prompt and measures how much of the answer "
            "comes with them. Results about the model belong below the directory that the app was started on:",
            lens_parts.model_command(page, "circuit", "--task", "induction", "--by", "head"),
        )
        return
    chosen = str(st.selectbox("Result", names, key="result", bind="query-params"))
    result = lens_parts.read(found[chosen])
    if result is None:
        return
    about = {name: str(result.about[name]) for name in ("task", "by", "method", "hook_point") if result.about.get(name)}
    lds = result.labels.get("logit_difference") or {}
    about |= {f"LD {name.replace('_', ' ')}": f"{value:+.2f}" for name, value in lds.items()}
    st.html(facts(about, chosen, help=HELP))
    if warning := result.labels.get("warning"):
        explain("This result means little", str(warning))
    texts = result.labels.get("first_prompts") or []
    for name, text in zip(("clean", "corrupt"), texts, strict=False):
        shown = "".join(each if each == " " else visible(each) for each in str(text))
        st.html(source_line(f"{name}: {shown}"))  # wraps, unlike facts
    if circuit := result.labels.get("circuit"):
        heading("The circuit")
        st.html(facts({"heads": ", ".join(map(str, circuit))}))
    heading("Measures beside their controls")
    lens_parts.draw_measure(result, lens_parts.measure_box(result, list(result.measures), "measure"), "patching")
