"""The whole dictionary as one table: filter, search, sort, download, open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from browser import catalogue, data, state
from browser.markup import explain, facts
from browser.state import Page

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
FLAGS = ["alive", "dead", "ultra-low", "dense", "absent"]


def show(page: Page) -> None:
    """Draws the table and its filters."""
    table = state.table_of(page)
    _summary(page, table)
    shown = _filters(page, table)
    _table(shown)
    left, right = st.columns([0.8, 0.2], vertical_alignment="center")
    left.caption(
        f"{len(shown):,} of {len(table):,} features, sorted by {st.session_state['sort']}. Select a row to open its "
        "feature; click a column's head to sort by it."
    )
    name = f"features-{page.entry.id.replace('/', '-')}"
    csv, parquet = right.columns(2)
    csv.download_button(
        "CSV", data=lambda: catalogue.to_csv(shown), file_name=f"{name}.csv", mime="text/csv", width="stretch"
    )
    parquet.download_button(
        "Parquet",
        data=lambda: shown.to_parquet(index=False),
        file_name=f"{name}.parquet",
        width="stretch",
        mime="application/vnd.apache.parquet",
    )


def _summary(page: Page, table: pd.DataFrame) -> None:
    counts = table["flag"].value_counts()
    live = table.loc[table["flag"] != "dead", "density"]
    if page.index.sampled:
        known = table["density"].notna().sum()
        values = {
            "features": f"{len(table):,}",
            "in the dump": f"{(table['flag'] != 'absent').sum():,}",
            "with a density": f"{known:,}",
            "sampled tokens": f"{page.index.kept_tokens:,}",
        }
        st.html(facts(values))
        st.caption(
            "Imported feature pages: samples of another tool, without weights and without the firings that were not "
            "sampled. Densities and maxima are the dump's own."
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
    st.html(facts(values))


def _filters(page: Page, table: pd.DataFrame) -> pd.DataFrame:
    """The widgets above the table, and the rows they leave."""
    search, flag, domain, density, sort = st.columns([0.27, 0.14, 0.16, 0.23, 0.2])
    text = search.text_input(
        "Search",
        key="q",
        bind="query-params",
        placeholder="in tokens, logits and domains",
        help="Part of a token, of a promoted token or of a domain, in any case. A space counts.",
        max_chars=80,
    )
    flag_now = flag.selectbox(
        "Flag",
        ["all", *FLAGS],
        key="flag",
        bind="query-params",
        help="dead: never fires in the indexed text. ultra-low: density below "
        f"{data.ULTRA_LOW:g}. dense: fires on more than {data.DENSE:.0%} of tokens.",
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
        help="Density is the share of kept tokens (BOS and padding left out) on which a feature "
        "is above zero. At the full range, dead features are shown too.",
    )
    names = [name for name, (column, _) in SORTS.items() if column in table]
    sorting = sort.selectbox("Sort by", names, key="sort", bind="query-params")
    shown = catalogue.select_features(
        table,
        flag="" if flag_now == "all" else str(flag_now),
        domain="" if domain_now == "all" else str(domain_now),
        log_density=None if bounds == (-7.0, 0.0) else bounds,
        text=text or "",
    )
    column, ascending = SORTS[str(sorting)]
    return shown.sort_values(column, ascending=ascending, kind="stable")


def _table(shown: pd.DataFrame) -> None:
    if shown.empty:
        explain("No feature passes these filters", "Widen the density range or clear the search.")
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
        "flag": text("flag", width=62),
        "density": number("density", format="%.2e", width=76, help="firings / kept tokens (no BOS, no padding)"),
        "max": number("max", format="%.2f", width=58, help="largest activation in the index"),
        "samples": number("samples", format="%d", width=72, help="firings in the texts of the dump, not all there are"),
        "mean": number("mean", format="%.2f", width=58, help="mean activation over its firings"),
        "top_token": text("top token", width=110, help="the token it fires on most often"),
        "top_token_share": share(
            "top share",
            format="%.2f",
            min_value=0,
            max_value=1,
            width=92,
            help="share of its firings that are on the top token",
        ),
        "top_logits": text("top positive logits", width=250, help="the five tokens it raises most, by logit weight"),
        "domain": text("domain", width=76, help="the domain most of its firings are in"),
        "domain_purity": share(
            "purity",
            format="%.2f",
            min_value=0,
            max_value=1,
            width=92,
            help="share of its firings that are in that domain",
        ),
        "cos_enc_dec": number(
            "cos enc·dec",
            format="%.2f",
            width=82,
            help="cosine of its encoder and decoder directions; near 0 in ultra-low features",
        ),
        "nearest_cosine": number(
            "nearest cos",
            format="%.2f",
            width=82,
            help="largest decoder cosine with another feature; near 1 means a twin",
        ),
        "label": text("label", width=130, help="your own label"),
        "auto_label": text(
            "label by rule",
            width=150,
            help="the short rule that tells best where it fires, found without a language model",
        ),
        "auto_f1": number(
            "rule F1", format="%.2f", width=66, help="F1 of that rule on the half of the text it was not learned on"
        ),
        "delta_loss": number(
            "Δloss",
            format="%+.3f",
            width=70,
            help="mean rise of the next token's loss without the feature, over sampled firings (nats; > 0: it helps)",
        ),
        "resampled_step": number("resampled", format="%d", width=82, help="step of its last resampling; empty: never"),
        "logit_kurtosis": number(
            "kurtosis", format="%.1f", width=68, help="kurtosis of its logit weights; high when it moves few tokens"
        ),
    }
