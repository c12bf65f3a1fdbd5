"""The dictionary as a table of features: search, filter, sort, open, download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from browser import catalogue, data, state
from browser.markup import explain, facts
from browser.state import Page
from browser.views import meaning, named_lists
from browser.views.download import download

HELP = (
    "Density = firings / kept tokens (all but BOS and padding). dead: never fires. ultra-low: density below "
    f"{data.ULTRA_LOW:g}. dense: above {data.DENSE:g}. Median density: over the features that are not dead. L0 = Σ of "
    "all densities."
)
SORTS = {
    "number": ("feature", True),
    "density, highest first": ("density", False),
    "density, lowest first": ("density", True),
    "max activation": ("max", False),
    "top-token share": ("top_token_share", False),
    "domain purity": ("domain_purity", False),
    "cos enc·dec": ("cos_enc_dec", False),
    "nearest cosine": ("nearest_cosine", False),
    "logit kurtosis": ("logit_kurtosis", False),
    "Δloss when active": ("delta_loss", False),
    "F1 of the label by rule": ("auto_f1", False),
    "label": ("label", False),
}


def show(page: Page) -> None:
    """Draws the table and its filters."""
    table = state.table_of(page)
    _summary(page, table)
    lists = named_lists.lists_of(page)
    shown, by_meaning = meaning.rank(page, _filters(page, table, lists))
    _table(shown)
    left, right = st.columns([0.7, 0.3], vertical_alignment="center")
    order = "similarity to the text" if by_meaning else st.session_state["sort"]
    left.caption(
        f"{len(shown):,} of {len(table):,} features, sorted by {order}. Select a row to open its "
        "feature; click a column's head to sort by it."
    )
    name = f"features-{page.entry.id.replace('/', '-')}"
    csv, parquet, menu = right.columns(3)
    download("CSV", f"{name}.csv", "text/csv", lambda: catalogue.to_csv(shown), csv)
    mime = "application/vnd.apache.parquet"
    download("Parquet", f"{name}.parquet", mime, lambda: shown.to_parquet(index=False), parquet)
    named_lists.manage(menu, page, lists, shown)


def _summary(page: Page, table: pd.DataFrame) -> None:
    counts = table["flag"].value_counts()
    live = table.loc[table["flag"] != "dead", "density"]
    if page.index.sampled:
        known = table["density"].notna().sum()
        values = {
            "features": f"{len(table):,}",
            "on the pages": f"{(table['flag'] != 'absent').sum():,}",
            "with a density": f"{known:,}",
            "sampled tokens": f"{page.index.kept_tokens:,}",
        }
        st.html(facts(values))
        st.caption(
            "Imported from another tool's feature pages: some sampled firings of each feature, without weights. "
            "Densities and maxima are those of the pages."
        )
        return
    values = {
        "features": f"{len(table):,}",
        "dead": f"{counts.get('dead', 0) / len(table):.1%}",
        "ultra-low": f"{counts.get('ultra-low', 0) / len(table):.1%}",
        "dense": f"{counts.get('dense', 0) / len(table):.1%}",
        "median density": f"{np.median(live):.2g}" if len(live) else "–",
        "features per token (L0)": f"{table['density'].sum():.1f}",
        "kept tokens": f"{page.index.kept_tokens:,}",
    }
    st.html(facts(values, help=HELP))


def _filters(page: Page, table: pd.DataFrame, lists: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """Draws the filters above the table; returns the rows that pass."""
    search, place, flag, domain, density, sort = st.columns([0.23, 0.15, 0.12, 0.13, 0.19, 0.18])
    text = search.text_input(
        "Search",
        key="q",
        bind="query-params",
        placeholder="token, label or domain",
        help="Part of a token that it fires on, of a token that it raises, of a label or of a domain. Case is ignored, "
        "spaces count.",
        max_chars=80,
    )
    chosen = named_lists.choose(place, lists)
    flag_now = flag.selectbox(
        "Flag",
        ["all", *catalogue.FLAGS],
        key="flag",
        bind="query-params",
        help=f"dead: never fires in the indexed text. ultra-low: density below {data.ULTRA_LOW:g}. dense: density "
        f"above {data.DENSE:g}. absent: not on the imported pages.",
    )
    domains = ["all", *(name for name in page.index.domains if name)]
    domain_now = domain.selectbox("Main domain", domains, key="domain", bind="query-params")
    bounds = density.slider(
        "Density, log₁₀",
        -7.0,
        0.0,
        (-7.0, 0.0),
        0.25,
        key="density",
        bind="query-params",
        help="Density = firings / kept tokens (all but BOS and padding). The full range includes dead features.",
    )
    names = [name for name, (column, _) in SORTS.items() if column in table]
    sorting = sort.selectbox("Sort by", names, key="sort", bind="query-params")
    shown = catalogue.select_features(
        table,
        flag="" if flag_now == "all" else str(flag_now),
        domain="" if domain_now == "all" else str(domain_now),
        log_density=None if bounds == (-7.0, 0.0) else bounds,
        text=text or "",
        features=lists.get(chosen) if chosen is not None else None,
    )
    column, ascending = SORTS[str(sorting)]
    return shown.sort_values(column, ascending=ascending, kind="stable")


def _table(shown: pd.DataFrame) -> None:
    if shown.empty:
        explain(
            "No feature passes these filters", "Widen the density range, or clear the search and the other filters."
        )
        return
    numbers = shown["feature"].to_numpy()

    def opened() -> None:
        rows = st.session_state["table"]["selection"]["rows"]
        if rows and rows[0] < len(numbers):
            state.open_feature(int(numbers[rows[0]]))

    st.dataframe(
        shown,
        key="table",
        height=620,
        row_height=27,
        hide_index=True,
        lazy=False,  # above 150,000 rows the lazy table would lose selection and search
        on_select=opened,
        selection_mode="single-row",
        column_config=_columns(),
    )


def _columns() -> dict[str, Any]:
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    share = st.column_config.ProgressColumn
    return {
        "feature": number("feature", format="%d", width=62, pinned=True),
        "similarity": number("similarity", format="%.3f", width=76, help="cosine of the feature's text and yours"),
        "flag": text("flag", width=62),
        "density": number("density", format="%.2e", width=76, help="firings / kept tokens (all but BOS and padding)"),
        "max": number("max", format="%.2f", width=58, help="largest activation in the index"),
        "samples": number("samples", format="%d", width=72, help="firings in the samples of the imported pages"),
        "mean": number("mean", format="%.2f", width=58, help="mean of the activations above zero"),
        "top_token": text("top token", width=110, help="token that it fires on most often"),
        "top_token_share": share(
            "top share",
            format="%.2f",
            min_value=0,
            max_value=1,
            width=92,
            help="firings on the top token / all firings",
        ),
        "top_logits": text(
            "top positive logits", width=250, help="the five tokens with the largest logit weight, direction · W_U"
        ),
        "domain": text("domain", width=76, help="domain with most of its firings"),
        "domain_purity": share(
            "purity", format="%.2f", min_value=0, max_value=1, width=92, help="firings in that domain / all firings"
        ),
        "cos_enc_dec": number(
            "cos enc·dec",
            format="%.2f",
            width=82,
            help="cosine of its encoder and decoder directions; near 0 for ultra-low features",
        ),
        "nearest_cosine": number(
            "nearest cos",
            format="%.2f",
            width=82,
            help="largest decoder cosine with another feature; near 1: a duplicate",
        ),
        "label": text("label", width=130, help="your own label"),
        "auto_label": text(
            "label by rule",
            width=150,
            help="short rule that best predicts where it fires, found without a language model",
        ),
        "auto_f1": number(
            "rule F1",
            format="%.2f",
            width=66,
            help="F1 of that rule on the half of the contexts that it was not learned on",
        ),
        "delta_loss": number(
            "Δloss",
            format="%+.3f",
            width=70,
            help="mean of (next token's loss without the feature − with it) over sampled firings, nats; > 0: it helps",
        ),
        "resampled_step": number(
            "resampled", format="%d", width=82, help="training step of its last resampling; empty: never"
        ),
        "logit_kurtosis": number(
            "kurtosis", format="%.1f", width=68, help="kurtosis of its logit weights; high if it moves few tokens"
        ),
    }
