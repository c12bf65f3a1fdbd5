"""One run: its configuration, training curves, evaluation and cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from browser import charts, data, runs
from browser.markup import explain, facts, heading
from browser.state import Page
from browser.views import growth, run_sites

CURVES = {  # logged name → title, definition
    "fvu": ("FVU", "Fraction of variance unexplained on the batch, Σ‖x − x̂‖² / Σ‖x − mean‖²."),
    "l0": ("L0", "Mean number of features with f > 0 per token."),
    "dead_share": ("Dead share", "Share of the features that have not fired recently."),
    "loss": ("Loss", "The training loss of the recipe, on the batch."),
    "rows_per_s": ("Tokens per second", "Training speed."),
    "lr": ("Learning rate", "After warm-up and decay."),
}

BASELINE_HELP = (
    "The baseline: the entries of the activation vectors themselves (neurons, after an activation function). L0: how "
    "many are not 0 per token. Participation ratio: mean of (Σa²)² / Σa⁴, how many equal units would be as "
    "concentrated. The k largest by absolute value take the place of x̂, k being the dictionary's L0."
)


def show(page: Page) -> None:
    """Draws the run of `page.entry`, trained or not."""
    if page.entry.is_dump:
        _dump(page)
        return
    log = runs.read_log(page.entry.path / "metrics.jsonl")
    progress = runs.progress_of(page.entry, log)
    _header(page, progress)
    if progress.state == "empty":
        explain(
            "Nothing has been logged yet",
            "The run has started, but its log is still empty (it gets a line every 25 steps). This page refreshes "
            "itself. If the run was killed, repeat the command it was started with.",
        )
    left, right = st.columns([0.5, 0.5], gap="medium")
    with left:
        if progress.state in ("training", "empty"):
            st.fragment(_training, run_every=5)(page)
        else:
            _training(page)
        _frontier(page)
    with right:
        report = data.read_config(page.entry.path / "eval.json")
        _fidelity(page, report, progress)
        if page.entry.is_crosscoder:
            run_sites.show(page, report)
        _density(page, report)
        _costs(page, log)
    growth.show(page)


def _dump(page: Page) -> None:
    """Where imported feature pages come from; there is no run behind them."""
    config, imported = page.entry.config, page.entry.config.get("imported") or {}
    values = {
        "format": str(imported.get("format", "?")),
        "imported from": f"{imported.get('source', '?')} ({imported.get('files', '?')} files)",
        "features on them": f"{imported.get('features', '?')} of {page.entry.d_sae:,}",
        "model": str((config.get("model") or {}).get("id", "?")),
        "hook point": str(config.get("hook_point") or "?"),
    }
    st.html(facts({k: v for k, v in values.items() if v != "?"}, page.entry.id, badge="imported pages"))
    explain(
        "These are another tool's feature pages",
        "They hold samples of each feature's firings, its logit weights and some statistics, but no training run, "
        "evaluation or weights. Features and Feature show what there is.",
    )


def _header(page: Page, progress: runs.Progress) -> None:
    config = page.entry.config
    model = config.get("model") or {}
    store = config.get("store") or config.get("live") or {}
    train = config.get("train") or {}
    values = {
        "recipe": str(config.get("recipe") or train.get("recipe") or "?"),
        "features": f"{page.entry.d_sae:,}",
        "d_in": str(config.get("d_in", "?")),
        "model": f"{model.get('id', '?')} ({str(model.get('sha256', ''))[:10]}…)",
        "hook point": str(config.get("hook_point", "?")),
        "text": f"{store.get('text', '?')} ({str(store.get('text_sha256', ''))[:10]}…)",
        "tokens trained": f"{int(train.get('tokens') or 0):,}",
        "seed": str(train.get("seed", "?")),
    }
    badge = {"trained": "trained", "training": "training now", "stopped": "stopped", "empty": "just started"}[
        progress.state
    ]
    known = {k: v for k, v in values.items() if v != "?" and "? (" not in v}
    st.html(facts(known, page.entry.id, badge=badge))
    if progress.state in ("training", "stopped"):
        share = progress.rows / max(1, progress.total)
        st.progress(min(1.0, share), f"{progress.rows:,} of {progress.total:,} tokens")
    if progress.state == "stopped":
        explain(
            "This run stopped before it was finished",
            f"Its log has not grown for {progress.quiet_s / 60:,.0f} minutes. Repeat the command it was started with: "
            "it continues from the last checkpoint, to the same result bit for bit.",
        )


def _training(page: Page) -> None:
    log = runs.read_log(page.entry.path / "metrics.jsonl")
    if not len(log):
        st.caption(
            "There is no training log (metrics.jsonl)." if not page.entry.unfinished else "Waiting for the log …"
        )
        return
    heading("Training")
    names = [name for name in CURVES if name in log and log[name].notna().any()]
    events = [int(event["step"]) for event in page.entry.config.get("resample_events") or [] if "step" in event]
    own = runs.baseline_of(data.read_config(page.entry.path / "eval.json"))
    lines = {"l0": ("own units", own.l0), "fvu": ("largest own units", own.largest.get("fvu"))} if own else {}
    columns = st.columns(2)
    for i, name in enumerate(names):
        with columns[i % 2]:
            st.caption(CURVES[name][0], help=CURVES[name][1])
            what, value = lines.get(name, ("", None))
            baseline = None if value is None else (what, value)
            st.altair_chart(charts.training_chart(log, name, events, baseline), key=f"curve-{name}")


def _fidelity(page: Page, report: dict[str, Any], progress: runs.Progress) -> None:
    heading("Fidelity on held-out text")
    if not report:
        if progress.state == "trained":
            explain(
                "Not evaluated yet",
                "One command measures its fidelity on the held-out split:",
                f"sae eval {page.entry.path}",
            )
        else:
            st.caption("Measured after training, by sae eval.")
        return
    checks = report.get("checks") or {}
    _baseline(runs.baseline_of(report))
    st.caption(f"{int(report.get('tokens') or 0):,} held-out tokens; 95% bootstrap intervals over contexts.")
    table = runs.fidelity_table(report)
    number = st.column_config.NumberColumn
    st.dataframe(
        table,
        hide_index=True,
        height=min(440, 38 + 27 * len(table)),
        row_height=27,
        key="fidelity",
        column_config={
            "metric": st.column_config.TextColumn(width=130),
            "value": number(format="%.4f", width=70),
            "low": number(format="%.4f", width=70),
            "high": number(format="%.4f", width=70),
            "units": number(
                "own units",
                format="%.4f",
                width=78,
                help="The same metric with the k largest of the layer's own units in place of x̂, k being the L0.",
            ),
            "formula": st.column_config.TextColumn(width=300),
        },
    )
    if checks.get("scores_are_noise"):
        explain(
            "The ce_loss_score metrics are unreliable here",
            f"Zero-ablation at this hook point costs only {checks.get('ablation_gap_nats')} nats, so a share of that "
            "cost is mostly noise. Use delta_ce instead.",
        )
    for key, title, named in (("by_domain", "By domain", "domain"), ("controls", "Controls", "control")):
        groups = report.get(key)
        if isinstance(groups, dict) and groups:
            with st.expander(title, expanded=key == "controls"):
                shown = runs.group_table(groups, named)
                first = [c for c in (named, "tokens", "l0", "fvu", "delta_ce", "ce_loss_score_zero") if c in shown]
                st.dataframe(
                    shown[[*first, *(c for c in shown if c not in first)]], hide_index=True, key=f"table-{key}"
                )


def _baseline(own: runs.Baseline | None) -> None:
    """The layer's own units, which a dictionary has to beat."""
    if own is None:
        return
    scores = {"fvu": "FVU", "delta_ce": "delta_ce", "ce_loss_score_zero": "ce_loss_score"}
    values = {
        "own units": f"{own.n_units:,}",
        "their L0": f"{own.l0:,.1f}",
        "participation ratio": f"{own.participation_ratio:,.1f}",
        **{
            f"{own.k:,} largest: {name}": f"{own.largest[key]:.4f}"
            for key, name in scores.items()
            if own.largest.get(key) is not None
        },
    }
    st.html(facts(values, help=BASELINE_HELP))
    if own.verdict:
        explain(
            "The dictionary is not better than the layer's own units", f"{own.verdict[0].upper()}{own.verdict[1:]}."
        )


def _density(page: Page, report: dict[str, Any]) -> None:
    histogram = runs.density_table(report)
    if histogram.empty:
        return
    dead = int(np.sum((report.get("density") or {}).get("dead") or 0))
    heading("Density of the features")
    st.altair_chart(charts.density_chart(histogram), key="densities")
    found = runs.clusters(histogram)
    ranges = "; ".join(f"{n:,} features from {10**low:.0e} to {10**high:.0e}" for low, high, n in found)
    kinds = "One cluster" if len(found) == 1 else f"{len(found)} clusters"
    st.caption(
        f"Density = firings / held-out tokens, as log₁₀. {kinds}: {ranges}. {dead:,} features never fired. Ultra-low "
        f"(violet): below {data.ULTRA_LOW:g}; dense (blue): above {data.DENSE:g}."
    )


def _frontier(page: Page) -> None:
    table = runs.frontier(page.entry, page.entries.values())
    if len(table) < 2:
        return
    heading("Frontier of this sweep")
    st.caption(
        f"FVU by L0 of the {len(table)} evaluated dictionaries in the same directory; the ring marks this one. Lower "
        "and further left is better. Dashed: the largest of the layer's own units, as many as each has active features."
    )
    st.altair_chart(charts.frontier_chart(table), key="frontier")


def _costs(page: Page, log: pd.DataFrame) -> None:
    found = runs.cost(page.entry, log)
    if found:
        heading("Cost")
        help_ = "Training time = Σ tokens / logged tokens per second. Sizes: files on disk."
        st.html(facts(found, help=help_))
    train = page.entry.config.get("train") or {}
    settings = {k: str(v) for k, v in train.items() if k not in ("recipe", "d_sae", "tokens", "seed") and v}
    if settings:
        heading("Settings")
        st.html(facts(settings))
