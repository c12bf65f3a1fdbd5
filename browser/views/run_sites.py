"""The part of the page Run that a crosscoder adds: its sites, and where its features are."""

from __future__ import annotations

from typing import Any

import streamlit as st

from browser import charts, data, runs
from browser.markup import explain, facts, heading
from browser.state import Page

SHARE_HELP = (
    "‖W_dec,i^s‖ / Σ_t ‖W_dec,i^t‖ of each active feature i, in units where each site's mean ‖x‖² is 1 (Lindsey et al. "
    "2024). The control is the same run with the sites' rows paired at random in training."
)


def show(page: Page, report: dict[str, Any]) -> None:
    """Draws the metrics at each site and the shares of the sites in the features' decoder norms."""
    sites = page.entry.config.get("sites") or []
    heading("Sites")
    st.html(facts({f"site {n}": str(site.get("name", "?")) for n, site in enumerate(sites, 1)}))
    if not report:
        return
    table = runs.site_table(report)
    if len(table):
        st.caption(
            "x̂ in the place of x at one site at a time"
            + (", and at all sites of a model at once." if any("all of" in name for name in table) else ".")
        )
        number = st.column_config.NumberColumn(format="%.4f")
        st.dataframe(
            table,
            hide_index=True,
            row_height=27,
            height=min(440, 38 + 27 * len(table)),
            key="sites",
            column_config={name: number for name in table.columns if name != "metric"},
        )
    for place, check in (report.get("checks") or {}).items():
        if isinstance(check, dict) and check.get("scores_are_noise"):
            explain(
                f"The ce_loss_score metrics of {place.replace('_', ' ')} are unreliable",
                f"Zero-ablation there costs only {check.get('ablation_gap_nats')} nats, so a share of that cost is "
                "mostly noise. Use delta_ce instead.",
            )
    _shares(page, report)


def _shares(page: Page, report: dict[str, Any]) -> None:
    control = runs.control_of(page.entry, page.entries.values())
    beside = data.read_config(control.path / "eval.json") if control else {}
    histogram = runs.share_table(report, beside)
    if histogram.empty:
        return
    heading("Where the features are")
    for site, part in histogram.groupby("site"):
        st.caption(f"Features by the share of site {site} in their decoder norms", help=SHARE_HELP)
        st.altair_chart(charts.share_chart(part), key=f"shares-{site}")
    st.caption(_counts(report["norm_share"]))
    if control:
        st.caption(
            f"Grey: the control {control.id}, scaled to as many features. In training its sites' rows were paired at "
            f"random, so what looks shared there is an artefact. {_counts(beside.get('norm_share') or {})}"
        )
    elif not report.get("shuffled_in_training"):
        explain(
            "Its control is missing",
            "What looks shared can be an artefact. Train the same run once more in a directory beside it, with the "
            "sites' rows paired at random (--set shuffle_sites=true), and evaluate it: it is then drawn here, too.",
        )
    else:
        st.caption("This run is a control: its sites' rows were paired at random, so what looks shared is an artefact.")


def _counts(shares: dict[str, Any]) -> str:
    """In words, how many features are at one site and how many at all."""
    alone = "; ".join(f"{count:,} at site {n} alone" for n, count in enumerate(shares.get("one_site") or [], 1))
    active, shared = (int(shares.get(name) or 0) for name in ("features", "shared"))
    limit = shares.get("one_site_above")
    return f"Of {active:,} active features: {alone} (share above {limit}); {shared:,} at all sites alike."
