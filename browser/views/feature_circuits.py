"""In circuits: heads that write or read the feature, what came before it, how early the prediction is there, its tasks.

Weights are read when the fold is opened; the rest comes from the results of lenses on the dictionary. Every node leads
to its page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from browser import lens_results, live, state
from browser.components import Row, RowList, draw_lists
from browser.lens_results import LensResult, Measured
from browser.live import LiveError, circuits
from browser.markup import facts, source_line
from browser.state import Page
from browser.tokens import label, plain_markdown
from browser.views import lens_parts

MOST_HEADS = 8
HELP = {
    "writes": "‖W_O e‖, e the feature's encoder column, / its mean over random directions of equal norm. 95% of random "
    "directions are below the last number. By weights alone: a head that could write the feature need not do so in a "
    "text.",
    "reads": "‖(d − mean d) · w @ W‖ with W the head's query, key or value matrix, d what the feature adds to the "
    "residual stream and w the weight of the norm before attention, / its mean over random directions of equal norm. "
    "95% of random directions are below the last number.",
    "rule": "F1 of the rule “fires where the token before is X”, chosen on training text and measured on held-out "
    "text, beside the feature's best rule about the current token, and about tokens before in a random order.",
    "depth": "KL(p_final ‖ p_lens) of the logit lens at each depth, over the tokens on which the feature fires; "
    "control: as many tokens, chosen blindly.",
    "tasks": "Patching on a task. First order and exact patches: the share of the answer's logit difference that comes "
    "back (restoring) or is kept (breaking). Paths into a head's q, k or v: 1 breaks nothing. Control: a random "
    "direction with the norm of the change.",
}


def show(page: Page) -> None:
    """Draws each part for which there is a result, and says in small print how to get the others."""
    _heads(page)
    found = lens_results.find(page.entry, state.root())
    own = {name: path for name, path in found.items() if path.parent == page.entry.path / lens_results.DIRECTORY}
    results = {name: result for name, path in own.items() if (result := lens_parts.read(path)) is not None}
    _rule(page, results.get("keys"))
    _depth(page, results.get("depth"))
    _tasks(page, {name: result for name, result in results.items() if result.lens == "circuit"})


def _missing(what: str, command: str) -> None:
    st.html(source_line(f"{what}: no result yet. Run: {command}"))


# --- heads, by weights -----------------------------------------------------------------------------------------------


def _heads(page: Page) -> None:
    try:
        writing, reading = circuits.heads_of_feature(live.load(page.entry), page.entry, page.feature)
    except LiveError as error:
        st.caption(plain_markdown(f"Heads that write or read it cannot be found: {error}"))
        return
    shown = [*writing[:MOST_HEADS], *reading[:MOST_HEADS]]
    n_writing = min(len(writing), MOST_HEADS)
    most = max((link.strength / link.random for link in shown), default=1.0)
    rows = [_head_row(link, number, most) for number, link in enumerate(shown)]
    lists = [
        RowList("Heads that can write it", rows[:n_writing], HELP["writes"], empty="none: no linear path leads to it"),
        RowList("Heads that can read it", rows[n_writing:], HELP["reads"], empty="none: no layer comes after it"),
    ]

    def opened(number: int) -> None:
        state.open_head(shown[number].layer, shown[number].head)

    draw_lists(lists, key="circuit-heads", two=True, on_open=opened)


def _head_row(link: Any, number: int, most: float) -> Row:
    ratio, chance = link.strength / link.random, link.random_95 / link.random
    way = "" if link.way == "writes" else f" {link.way}"
    return Row(
        f"head {link.layer}.{link.head}{way}", f"×{ratio:.2f}", ratio / most, f"random ×{chance:.2f}", open=number
    )


# --- results ---------------------------------------------------------------------------------------------------------


def _of_feature(result: LensResult, name: str, feature: int) -> float:
    array = result.arrays.get(name)
    return float(array[feature]) if array is not None and feature < len(array) else float("nan")


def _rule(page: Page, result: LensResult | None) -> None:
    if result is None:
        if str(page.index.attributes.get("hook_point", "")).endswith("hook_attn_out"):
            _missing("What the token before was", lens_parts.dictionary_command(page, "keys"))
        return
    f1, token = (_of_feature(result, name, page.feature) for name in ("rule_f1", "rule_token"))
    if not np.isfinite(f1):
        st.html(source_line("It fired too seldom on held-out text to say which token came before."))
        return
    values = {
        "the token before is": label(page.index.token_bytes(int(token))),
        "held-out F1": f"{f1:.2f}",
        "firings": f"{_of_feature(result, 'rule_firings', page.feature):,.0f}",
    }
    for name, title in (("current_token", "current token"), ("shuffled_labels", "random order")):
        control = _of_feature(result, f"rule_f1_{name}", page.feature)
        if np.isfinite(control):
            values[f"F1, {title}"] = f"{control:.2f}"
    st.html(facts(values, help=HELP["rule"]))


def _depth(page: Page, result: LensResult | None) -> None:
    measure = None if result is None else result.measures.get("kl_by_feature")
    if result is None or measure is None:
        _missing("How early the prediction is there", lens_parts.dictionary_command(page, "depth"))
        return
    values = measure.figure.value
    if page.feature >= len(values):
        return
    st.caption("Logit lens where it fires: KL to the last layer, nats", help=HELP["depth"])
    columns: dict[str, Any] = {"depth": result.names("depth", "kl_by_feature", values.shape[1])}
    columns["KL"] = values[page.feature]
    columns |= {kind: control.value[page.feature] for kind, control in measure.controls.items()}
    numbers = {name: st.column_config.NumberColumn(format="%.3f") for name in columns if name != "depth"}
    st.dataframe(pd.DataFrame(columns), hide_index=True, key="circuit-depth", column_config=numbers)


def _tasks(page: Page, results: dict[str, LensResult]) -> None:
    rows: list[Row] = []
    opens: list[Callable[[], None]] = []
    for name, result in results.items():
        for measure in result.measures.values():
            for target, value, control in _effects(result, measure, page.feature):
                number = len(opens)
                opens.append(_opener(name, measure.name, target))
                beside = "" if not np.isfinite(control) else f"random {control:+.3f}"
                what = f"{name.removeprefix('circuit-')} {measure.name}{f' → {target}' if target else ''}"
                what += " (the model does not do the task)" if result.labels.get("warning") else ""
                rows.append(Row(what, f"{value:+.3f}", min(1.0, abs(value)), beside, negative=value < 0, open=number))
    if not rows:
        command = lens_parts.dictionary_command(page, "circuit", "--task", "induction", "--by", "feature")
        _missing("Tasks that it carries", command)
        return
    tasks = RowList("Tasks that it carries", rows, HELP["tasks"])
    draw_lists([tasks], key="circuit-tasks", on_open=lambda number: opens[number]())


def _opener(result: str, measure: str, target: str) -> Callable[[], None]:
    head = lens_results.head_named(target)
    if head is not None:
        return lambda: state.open_head(*head)
    return lambda: state.open_result(result, measure)


def _effects(result: LensResult, measure: Measured, feature: int) -> Iterator[tuple[str, float, float]]:
    """(what it acts on, value, control) of each entry of a measure that is about the feature."""
    value = measure.figure.value
    control = next(iter(measure.controls.values())).value
    control = np.broadcast_to(control, value.shape) if control.ndim <= value.ndim else np.full(value.shape, np.nan)
    if measure.axes == ("feature",):
        if feature < len(value):
            yield "", float(value[feature]), float(control[feature])
        return
    if not measure.axes or measure.axes[0] not in ("site", "sender"):
        return
    for place, name in enumerate(result.names(measure.axes[0], measure.name, len(value))):
        if lens_results.feature_named(name) != feature:
            continue
        if value.ndim == 1:
            yield "", float(value[place]), float(control[place])
        elif measure.axes[0] == "site":
            yield "", float(value[place, 0]), float(control[place, 0])
        else:  # paths: the receivers that hear it most
            names = result.names(measure.axes[1], measure.name, value.shape[1])
            for i in np.argsort(-np.abs(1 - value[place]), kind="stable")[:3].tolist():
                yield names[i], float(value[place, i]), float(control[place, i])
