"""Lens rows of the page Microscope: what each layer would predict if it were the last one, beside a control."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from browser import lens_charts, lens_results, state
from browser.lens_results import LensResult
from browser.live import Live, LiveError, depth
from browser.markup import explain, heading, source_line
from browser.state import Page
from browser.tokens import label
from browser.views import lens_parts

WINDOW = 14  # tokens in the picture
HELP = {
    "toggle": "What each layer would predict if it were the last: the logit lens, and the tuned lens where `sae lens "
    "depth` has trained it.",
    "logit": "logits = W_U · norm_final(h), h the residual stream after the layer. Each cell: the likeliest next "
    "token; the stronger the orange, the higher its probability. The last row is the model itself.",
    "tuned": "The same after h + A h + b, with A and b trained to predict the model's own last layer.",
    "reads": "The likeliest next token.",
    "kl": "KL(p_final ‖ p_lens) in nats: how far the reading is from the model's own prediction.",
    "kl_elsewhere": "The control: the same KL with the stream of another position of this prompt, mean over all "
    "others.",
    "p_next": "The probability of the token that follows in the prompt.",
    "rank": "Number of tokens that the lens finds likelier than the token that follows.",
    "rank_elsewhere": "The control: the same rank in the stream of another position, mean over all others.",
    "bias": "The control of `sae lens depth` on held-out text: mean KL of a tuned lens of which only b is trained.",
}


def show(page: Page, loaded: Live, ids: list[int], at: int) -> None:
    """Draws the rows of both lenses around the chosen token, and the numbers at that token."""
    try:
        logit = depth.logit_lens(loaded, ids)
        result, tuned = _tuned(page, loaded, ids)
    except LiveError as error:
        explain("The lenses cannot read this model", str(error))
        return
    heading("What each layer reads")
    _picture(page, "Logit lens", "logit", logit, ids, at)
    if tuned is not None:
        _picture(page, "Tuned lens", "tuned", tuned, ids, at)
    _numbers(page, logit, tuned, result, at)


def _tuned(page: Page, loaded: Live, ids: list[int]) -> tuple[LensResult | None, Any]:
    """The result of `sae lens depth` and what its tuned lens reads; a line that says how to get it where it is not."""
    path = lens_results.find(page.entry, state.root()).get("depth")
    result = None if path is None else lens_parts.read(path)
    if result is None or depth.WEIGHT not in result.arrays:
        why = "not trained yet" if result is None else f"{result.path.name} has no maps of it"
        command = lens_parts.model_command(page, "depth")
        st.html(source_line(f"The tuned lens is missing ({why}). Run: {command}"))
        return result, None
    return result, depth.tuned_lens(loaded, ids, result.path, result.arrays)


def _layers(names: list[str]) -> list[str]:
    """`embedding`, `after layer 0` … of the hook points of the depths."""
    return ["embedding", *(f"after layer {name.split('.')[1]}" for name in names[1:])]


def _picture(page: Page, title: str, which: str, found: Any, ids: list[int], at: int) -> None:
    st.caption(title, help=HELP[which])
    first = min(max(0, at - WINDOW + 3), max(0, len(ids) - WINDOW))
    shown = range(first, min(len(ids), first + WINDOW))
    layers = _layers(found.depths)
    rows = [
        {
            "layer": layers[depth_],
            "position": f"{position:03d}",
            "reads": label(page.index.token_bytes(int(found.token[depth_, position]))),
            "p": float(found.p[depth_, position]),
            "kl": float(found.kl[depth_, position]),
            "kl_elsewhere": float(found.kl_elsewhere[depth_, position]),
        }
        for depth_ in range(len(layers))
        for position in shown
    ]
    names = {f"{i:03d}": f"{i} {label(page.index.token_bytes(ids[i]))}" for i in shown}
    chart = lens_charts.reading_chart(pd.DataFrame(rows), layers[::-1], names, f"{at:03d}")
    st.altair_chart(chart, key=f"lens-{which}")


def _numbers(page: Page, logit: Any, tuned: Any, result: LensResult | None, at: int) -> None:
    """The readings at the chosen token, each beside its control."""
    columns: dict[str, Any] = {"layer": _layers(logit.depths)}
    config: dict[str, Any] = {}
    for name, found in (("logit", logit), ("tuned", tuned)):
        if found is None:
            continue
        columns[f"{name} lens"] = [label(page.index.token_bytes(int(i))) for i in found.token[:, at]]
        config[f"{name} lens"] = st.column_config.TextColumn(help=HELP["reads"])
        for column, title in (
            ("p_next", "p(next)"),
            ("rank", "rank"),
            ("rank_elsewhere", "rank elsewhere"),
            ("kl", "KL"),
            ("kl_elsewhere", "KL elsewhere"),
        ):
            values = np.asarray(getattr(found, column)[:, at], float)
            format_ = "%.1f" if column.startswith("rank") else "%.3f"
            if np.isfinite(values).any():
                columns[f"{title}, {name}"] = values
                config[f"{title}, {name}"] = st.column_config.NumberColumn(format=format_, help=HELP[column])
    bias = _bias_only(result, len(logit.depths)) if tuned is not None else None
    if bias is not None:
        columns["held-out KL, bias only"] = bias
        config["held-out KL, bias only"] = st.column_config.NumberColumn(format="%.3f", help=HELP["bias"])
    st.dataframe(pd.DataFrame(columns), hide_index=True, key="lens-numbers", column_config=config)


def _bias_only(result: LensResult | None, n_depths: int) -> np.ndarray | None:
    measure = None if result is None else result.measures.get("kl_tuned_lens")
    control = None if measure is None else measure.controls.get("bias_only")
    return control.value if control is not None and control.value.shape == (n_depths,) else None
