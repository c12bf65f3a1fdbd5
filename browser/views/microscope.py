"""The prompt microscope: what fires on each token of a prompt, what is lost there, and what pushes the next token."""

from __future__ import annotations

from typing import Any

import numpy as np
import streamlit as st

from browser import data, live, state
from browser.components import Row, RowList, draw_lists
from browser.components.grid import Bars, Cells, Column, draw_grid
from browser.live import LiveError, prompts
from browser.markup import explain
from browser.state import Page
from browser.tokens import label, pieces
from browser.views import lens_rows
from browser.views.prompt_box import position_box, prompt_box

ORDERS = {
    "max": "largest activation",
    "sum": "Σ activation",
    "next": "push on the next token",
    "here": "at the chosen token",
}
HELP = {
    "error": "‖x − x̂‖² / ‖x − b_dec‖²: the share of this token's activation x that the reconstruction x̂ leaves "
    "unexplained.",
    "loss": "−log p of this token given the tokens before it, in nats, in the unchanged model.",
    "delta": "Loss with the reconstruction in place of the model's activations (at every position but BOS) − loss "
    "without. Above zero: the dictionary lost something that this token needed.",
    "grid": "Colour: activation / the feature's maximum in the index. Click a token (or press ↑ ↓) to choose it; "
    "click a number at the top to open that feature.",
    "push_exact": "What the feature adds to the logit of the chosen next token, minus the mean over the vocabulary: a "
    "· (direction · w_ln / σ) · W_U. Only the final norm and the unembedding read this hook point, so all parts sum to "
    "the logit, exactly, with these held at their values: ",
    "push_slope": "Gradient × activation: ∂(logit of the chosen next token − mean logit) / ∂a · a, over all positions. "
    "A first-order estimate, because later layers read this hook point.",
    "next": "Probabilities of the next token after the chosen one. Click one to see what pushes it.",
}
MOST_COLUMNS = 60


def show(page: Page) -> None:
    """Draws the prompt, the heat map, and the chosen token's features."""
    try:
        loaded = live.load(page.entry)
    except LiveError as error:
        explain("The microscope needs the model", str(error))
        return
    prompt = prompt_box(height=76)
    try:
        ids = prompts.encode(loaded, prompt)
        found = prompts.inspect(loaded, page.entry, ids)
    except LiveError as error:
        explain("This prompt cannot be shown", str(error))
        return
    order, columns, dense, at, asked = _settings(len(ids), page.index.d_vocab)
    token = _next_token(loaded, ids, at, asked)
    pushes = prompts.attribute(loaded, page.entry, ids, at, token)
    left, right = st.columns([0.62, 0.38], gap="medium")
    with left:
        _grid(page, ids, found, pushes, at, order=order, most=columns, hide_dense=dense)
    with right:
        _token(page, loaded, ids, found, pushes, at, token)
    if st.toggle("Lens rows: what each layer reads", key="lens", bind="query-params", help=lens_rows.HELP["toggle"]):
        lens_rows.show(page, loaded, ids, at)


def _settings(n_tokens: int, d_vocab: int) -> tuple[str, int, bool, int, int | None]:
    order, count, place, following, dense = st.columns([0.44, 0.12, 0.11, 0.14, 0.19], vertical_alignment="bottom")
    chosen = order.segmented_control(
        "Features by",
        list(ORDERS),
        format_func=ORDERS.__getitem__,
        default="max",
        required=True,
        key="by",
        bind="query-params",
    )
    columns = count.number_input("Features shown", 1, MOST_COLUMNS, 24, key="columns", bind="query-params")
    with place:
        at = position_box(n_tokens)
    asked = following.number_input(
        "Next token id",
        0,
        d_vocab - 1,
        None,
        key="next",
        bind="query-params",
        placeholder="automatic",
        help="The next token to explain. Empty: the token that follows the chosen one; after the last, the most "
        "likely. Click a prediction to set it.",
    )
    hide = dense.toggle(
        "Hide dense features",
        value=True,
        key="hide",
        bind="query-params",
        help=f"Features that fire on more than {data.DENSE:.0%} of the tokens in the index.",
    )
    return str(chosen), int(columns), bool(hide), at, None if asked is None else int(asked)


def _next_token(loaded: Any, ids: list[int], at: int, asked: int | None) -> int:
    """The next token to explain: the chosen one, else the one that follows, else the most likely."""
    if asked is not None:
        return asked
    if at + 1 < len(ids):
        return ids[at + 1]
    return prompts.predictions(loaded, ids, 1)[0][0]


def _grid(
    page: Page, ids: list[int], found: Any, pushes: Any, at: int, *, order: str, most: int, hide_dense: bool
) -> None:
    index = page.index
    maxima = np.where(index.stats["max"] > 0, index.stats["max"], 1.0)
    positions, features, acts = (np.asarray(part) for part in (found.positions, found.features, found.acts))
    bos = index.attributes.get("bos")
    kept = np.array([i != bos for i in ids])[positions]
    l0 = int(kept.sum()) / max(1, len(ids) - int(bos in ids))
    if hide_dense:
        kept &= (data.density(index) <= data.DENSE)[features]
    positions, features, acts = positions[kept], features[kept], acts[kept]
    ranked = _ranked(page, positions, features, acts, pushes, at, order)[:most]
    place = {feature: i for i, feature in enumerate(ranked)}
    shown = np.isin(features, ranked)
    cells = Cells(
        positions[shown],
        np.array([place[f] for f in features[shown].tolist()], np.int64),
        acts[shown],
        maxima[ranked] if ranked else np.zeros(0),
    )
    loss, spliced = np.asarray(found.loss), np.asarray(found.loss_spliced)
    draw_grid(
        ids,
        pieces([index.token_bytes(i) for i in ids]),
        bars=[
            Bars("unexplained", np.asarray(found.error), HELP["error"]),
            Bars("loss", loss, HELP["loss"]),
            Bars("Δloss, spliced", spliced - loss, HELP["delta"]),
        ],
        columns=[Column(str(f), state.token_label(index, f), f) for f in ranked],
        cells=cells,
        unit="activation",
        selected=at,
        key="microscope",
        on_row=_choose,
        on_column=state.open_feature,
        height=640,
    )
    delta = float(np.nanmean(spliced - loss)) if len(ids) > 1 else 0.0
    st.caption(
        f"{len(ranked)} of {len(np.unique(features)):,} features shown; on average {l0:.1f} fire on a token; mean "
        f"Δloss {delta:+.3f} nats with the reconstruction spliced in.",
        help=HELP["grid"],
    )


def _ranked(
    page: Page, positions: np.ndarray, features: np.ndarray, acts: np.ndarray, pushes: Any, at: int, order: str
) -> list[int]:
    """The firing features, best first."""
    score = np.zeros(page.index.d_sae)
    if order == "sum":
        np.add.at(score, features, acts)
    elif order == "next":
        np.add.at(score, np.asarray(pushes.features), np.abs(np.asarray(pushes.by_feature)))
    elif order == "here":
        score[features[positions == at]] = acts[positions == at]
    else:
        np.maximum.at(score, features, acts)
    firing = np.unique(features)
    best = firing[np.lexsort((firing, -score[firing]))]
    return [int(f) for f in best if score[f] > 0]


def _choose(position: int) -> None:
    st.session_state["at"] = position
    st.session_state["next"] = None


def _ask(token: int) -> None:
    st.session_state["next"] = token


def _token(page: Page, loaded: Any, ids: list[int], found: Any, pushes: Any, at: int, token: int) -> None:
    """The chosen token: what fires there, what pushes the chosen next token, what the model predicts."""
    index = page.index
    here = np.asarray(found.positions) == at
    features, acts = np.asarray(found.features)[here], np.asarray(found.acts)[here]
    maxima = np.where(index.stats["max"] > 0, index.stats["max"], 1.0)
    best = np.argsort(-acts, kind="stable")[:12]
    firing = [
        Row(
            state.token_label(index, int(features[i])),
            f"{acts[i]:.3f}",
            float(acts[i] / maxima[features[i]]),
            f"{acts[i] / maxima[features[i]]:.0%} of max",
            prefix=str(features[i]),
            open=int(features[i]),
            add=True,
        )
        for i in best
    ]
    name, wanted = label(index.token_bytes(ids[at])), label(index.token_bytes(token))
    help_ = "Features that fire on the chosen token, by activation. + adds a feature to the steering set."
    firing_list = RowList(f"Fires on {at} {name}", firing, help_, "orange", "no feature fires here")
    draw_lists([firing_list], key="firing", on_open=state.open_feature, on_add=state.add_edit)
    _pushing(page, pushes, wanted, at)
    likely = prompts.predictions(loaded, ids[: at + 1], 8)
    rows = [
        Row(label(index.token_bytes(i)), f"{p:.1%}", p / likely[0][1], prefix="●" if i == token else "○", open=i)
        for i, p in likely
    ]
    draw_lists([RowList("Predicted after it", rows, HELP["next"])], key="likely", on_open=_ask)


def _pushing(page: Page, pushes: Any, wanted: str, at: int) -> None:
    values, features = np.asarray(pushes.by_feature), np.asarray(pushes.features)
    positions = np.asarray(pushes.positions)
    best = np.argsort(-np.abs(values), kind="stable")[:10]
    parts = {"b_dec": pushes.bias, "unexplained (x − x̂)": pushes.unexplained}
    parts["everything else"] = pushes.rest
    most = max([1e-9, *np.abs(values[best]).tolist(), *(abs(v) for v in parts.values())])
    rows = [
        Row(
            state.token_label(page.index, int(features[i])),
            f"{values[i]:+.3f}",
            abs(float(values[i])) / most,
            "" if positions[i] == at else f"at {positions[i]}",
            prefix=str(features[i]),
            negative=bool(values[i] < 0),
            open=int(features[i]),
            add=True,
        )
        for i in best
    ]
    others = float(values.sum() - values[best].sum())
    if len(values) > len(best):
        parts = {f"other features ({len(values) - len(best):,})": others, **parts}
    rows += [Row(name, f"{v:+.3f}", abs(v) / most, negative=v < 0) for name, v in parts.items()]
    rows.append(Row("logit − mean logit", f"{pushes.logit:+.3f}", 0.0))
    how = "exact" if pushes.exact else "gradient × activation"
    help_ = HELP["push_exact"] + " and ".join(pushes.held_fixed) + "." if pushes.exact else HELP["push_slope"]
    if pushes.before_soft_cap is not None:
        help_ += f" The logit is the one before the model's soft cap of {pushes.before_soft_cap:g}."
    title = RowList(f"Pushes {wanted} next ({how})", rows, help_)
    draw_lists([title], key="pushing", on_open=state.open_feature, on_add=state.add_edit)
