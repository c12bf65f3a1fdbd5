"""`sae.interventions.steering` within the limits of the app."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from browser.live import Live, LiveError
from browser.live.prompts import Prompt, check_prompt

MAX_NEW_TOKENS = 128
MAX_FEATURES = 16
MAX_STRENGTHS = 6
SWEEP = (0.0, 1.0, 2.0, 5.0, 10.0)
PINNED_PROMPT = "1,2,3,4,5,6,7,8,9,10"
MODES = ("set", "add", "scale", "ablate")
UNITS = ("max", "p99")
ERASE = "erase:"  # `erase:CONCEPT`


def parse(text: str, erasers: Mapping[str, Path] | None = None) -> list[Any]:
    """Edits written as `FEATURE:MODE[:VALUE][:p99][:active]` or `erase:CONCEPT`, separated by spaces or commas.

    `erasers` are the results of `sae lens erase` by concept. Raises LiveError.
    """
    from sae.interventions.edits import Edit, erased_concept

    try:
        edits = [
            _erasure(*erased, erasers or {}) if (erased := erased_concept(part)) else Edit.parse(part)
            for part in text.replace(",", " ").split()
        ]
    except ValueError as error:
        raise LiveError(str(error).removeprefix("steering: ")) from error
    if len(edits) > MAX_FEATURES:
        raise LiveError(f"There are {len(edits)} edits; at most {MAX_FEATURES} at once.")
    return edits


def _erasure(concept: str, is_control: bool, erasers: Mapping[str, Path]) -> Any:
    if concept not in erasers:
        known = f"there are {', '.join(sorted(erasers))}" if erasers else "there is none"
        raise LiveError(
            f"No result of `sae lens erase` on this dictionary is named {concept!r}; {known}. The lens writes one for "
            "each concept."
        )
    path = erasers[concept]
    return _read_erasure(str(path), path.stat().st_mtime_ns, is_control)


@st.cache_resource(max_entries=8, show_spinner=False)
def _read_erasure(path: str, stamp: int, is_control: bool) -> Any:
    from sae.circuits.erase_edit import erase_edit

    return erase_edit(path, control=is_control)


def is_erasure(edit: Any) -> bool:
    """Whether an edit erases a concept; else it changes a feature."""
    return not hasattr(edit, "feature")


def control_of(edits: Sequence[Any], erasers: Mapping[str, Path]) -> list[Any]:
    """The same edits with random subspaces of equal rank instead of what is erased; [] if nothing is erased."""
    if not any(is_erasure(each) and not each.is_control for each in edits):
        return []
    return [_erasure(e.name, True, erasers) if is_erasure(e) else e for e in edits]


def edit(feature: int, mode: str, value: float, unit: str, only_active: bool) -> Any:
    """One edit from the table of the page. Raises LiveError."""
    from sae.interventions.edits import Edit

    try:
        return Edit(feature, mode, value, unit, only_active)
    except ValueError as error:
        raise LiveError(str(error).removeprefix("steering: ")) from error


def generation(seed: int, max_new_tokens: int, temperature: float) -> Any:
    """How the texts are written: a `sae.interventions.steering.Generation`. Raises LiveError."""
    from sae.interventions.steering import Generation

    try:
        return Generation(seed, max_new_tokens, temperature)
    except ValueError as error:
        raise LiveError(str(error).removeprefix("steering: ")) from error


def sweep(
    live: Live,
    prompt: Prompt | str,
    edits: Sequence[Any],
    factors: Sequence[float],
    generation: Any,
    units: dict[str, Any],
    control: Sequence[Any] = (),
) -> Iterator[list[Any]]:
    """`sae.interventions.steering` within the app's limits: the growing texts, one per factor, then the control's.

    Raises LiveError beyond the limits.
    """
    prompt = Prompt.of(prompt)
    check_prompt(prompt.text)
    if not edits:
        raise LiveError("Nothing is steered yet: add a feature to the table, or write an edit such as 12:set:5.")
    if len(edits) > MAX_FEATURES:
        raise LiveError(f"There are {len(edits)} edits; at most {MAX_FEATURES} at once.")
    if generation.max_new_tokens > MAX_NEW_TOKENS:
        raise LiveError(f"{generation.max_new_tokens} new tokens are too many; at most {MAX_NEW_TOKENS}.")
    if not 1 <= len(factors) <= MAX_STRENGTHS:
        raise LiveError(f"There are {len(factors)} strengths; allowed are 1 to {MAX_STRENGTHS}.")
    from sae.interventions.edits import scaled
    from sae.interventions.steering import alternatives_stream

    try:
        asked = prompt.asked()
        sets = [scaled(edits, factor) for factor in factors] + ([list(control)] if control else [])
        rows = alternatives_stream(live.model, live.sae, asked.pop("prompt"), sets, generation, **units, **asked)
    except ValueError as error:
        raise LiveError(str(error).removeprefix("steering: ")) from error
    yield from rows


def next_tokens(live: Live, ids: Sequence[int], edits: Sequence[Any], *, n: int, units: dict[str, Any]) -> Any:
    """`sae.interventions.steering.next_tokens`: the distributions after `ids`, without and with the edits."""
    from sae.interventions.steering import next_tokens as found

    return found(live.model, live.sae, ids, edits, n=n, **units)


def as_command(path: str, prompt: Prompt, edits: Sequence[Any], factors: list[float], generation: Any) -> str:
    """The `sae steer` command that generates the same text."""
    import shlex

    words = ["sae", "steer", path, *(w for e in edits for w in ("--edit", str(e))), "--prompt", prompt.text]
    words += {"text": [], "special": ["--special-tokens"], "chat": ["--chat"]}[prompt.form]
    words += ["--seed", str(generation.seed), "--max-new-tokens", str(generation.max_new_tokens)]
    if generation.temperature != 1.0:
        words += ["--temperature", f"{generation.temperature:g}"]
    if factors != [1.0]:
        words += ["--sweep", ",".join(f"{f:g}" for f in factors)]
    return shlex.join(words)


def _as_code(path: str, edit: Any) -> str:
    if not is_erasure(edit):
        return repr(edit)
    return f"pipeline.erasure({path!r}, {edit.name!r}{', control=True' if edit.is_control else ''})"


def as_python(path: str, prompt: Prompt, edits: Sequence[Any], factors: list[float], generation: Any) -> str:
    """The Python code that generates the same text."""
    asked = prompt.asked()
    special = ", special_tokens=True" if asked["special_tokens"] else ""
    lines = [
        "from sae import pipeline",
        "from sae.interventions.edits import Edit",
        "from sae.interventions.steering import Generation, sweep_stream",
        "",
        f"sae, model = pipeline.open_pair({path!r})",
        f"units = pipeline.feature_units({path!r})",
        f"edits = [{', '.join(_as_code(path, each) for each in edits)}]",
        f"factors = {factors!r}",
        f"generation = {generation!r}",
        f"*_, rows = sweep_stream(model, sae, {asked['prompt']!r}, edits, factors, generation{special}, **units)",
        "for factor, row in zip(factors, rows):",
        "    print(factor, row.steered_text, row.steered_perplexity)",
    ]
    return "\n".join(lines)
