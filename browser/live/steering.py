"""`sae.interventions.steering` within the limits of the app."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from browser.live import Live, LiveError
from browser.live.prompts import Prompt, check_prompt

MAX_NEW_TOKENS = 128
MAX_FEATURES = 16
MAX_STRENGTHS = 6
SWEEP = (0.0, 1.0, 2.0, 5.0, 10.0)
PINNED_PROMPT = "1,2,3,4,5,6,7,8,9,10"
MODES = ("set", "add", "scale", "ablate")
UNITS = ("max", "p99")


def parse(text: str) -> list[Any]:
    """Edits written as `FEATURE:MODE[:VALUE][:p99][:active]`, separated by spaces or commas. Raises LiveError."""
    from sae.interventions.edits import Edit

    try:
        edits = [Edit.parse(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise LiveError(str(error).removeprefix("steering: ")) from error
    if len(edits) > MAX_FEATURES:
        raise LiveError(f"There are {len(edits)} edits; at most {MAX_FEATURES} at once.")
    return edits


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
) -> Iterator[list[Any]]:
    """`sae.interventions.steering.sweep_stream` within the app's limits: the growing texts, one per factor.

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
    from sae.interventions.steering import sweep_stream

    try:
        asked = prompt.asked()
        rows = sweep_stream(live.model, live.sae, asked.pop("prompt"), edits, factors, generation, **units, **asked)
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
        f"edits = {list(edits)!r}",
        f"factors = {factors!r}",
        f"generation = {generation!r}",
        f"*_, rows = sweep_stream(model, sae, {asked['prompt']!r}, edits, factors, generation{special}, **units)",
        "for factor, row in zip(factors, rows):",
        "    print(factor, row.steered_text, row.steered_perplexity)",
    ]
    return "\n".join(lines)
