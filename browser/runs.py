"""Reads a run directory: its state, log, evaluation, neighbours in a sweep and cost; no Streamlit here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from browser.data import SaeEntry, read_config
from store.common import is_control_of

POINTS = 400  # drawn per curve
QUIET_S = 600  # a run whose log has not grown for this long has stopped
MAIN_METRICS = (
    "l0",
    "fvu",
    "delta_ce",
    "ce_loss_score_zero",
    "ce_loss_score_mean",
    "ce_gain_over_units",
    "ce_clean",
    "ce_sae",
    "ce_zero",
    "ce_mean",
    "dead_share",
    "ultra_low_share",
)


def read_log(path: Path, points: int = POINTS) -> pd.DataFrame:
    """The entries of a metrics.jsonl, thinned evenly to `points` including the last; an incomplete line is skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return pd.DataFrame()
    kept = (
        np.unique(np.linspace(0, len(lines) - 1, min(points, len(lines))).round().astype(int)).tolist() if lines else []
    )
    entries = []
    for i in kept:
        try:
            entry = json.loads(lines[i])
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return pd.DataFrame(entries)


@dataclass(frozen=True)
class Progress:
    """The state of a run: "trained", "training", "stopped" or "empty" (no log yet); `rows` of `total` tokens seen."""

    state: str
    rows: int
    total: int
    quiet_s: float


def progress_of(entry: SaeEntry, log: pd.DataFrame, now: float | None = None) -> Progress:
    """The progress of a run; it counts as training if its log grew within the last ten minutes."""
    total = int((entry.config.get("train") or {}).get("tokens") or 0)
    rows = int(log["rows"].iloc[-1]) if "rows" in log and len(log) else 0
    try:
        quiet = (now or time.time()) - (entry.path / "metrics.jsonl").stat().st_mtime
    except OSError:
        quiet = float("inf")
    if not entry.unfinished:
        return Progress("trained", rows, total, quiet)
    if not len(log):
        return Progress("empty", 0, total, quiet)
    return Progress("training" if quiet < QUIET_S else "stopped", rows, total, quiet)


OF_UNITS = "topk_units_"  # the same metric of the k largest of the layer's own units


def fidelity_table(report: dict[str, Any]) -> pd.DataFrame:
    """The metrics of an eval.json, main ones first: metric, value, low, high (95% bootstrap interval), units, formula.

    `units` is the value of as many of the layer's own units, where it was measured.
    """
    metrics = report.get("metrics") or {}
    beside = {name for name in metrics if name.startswith(OF_UNITS) and name.removeprefix(OF_UNITS) in metrics}
    names = [name for name in MAIN_METRICS if name in metrics] + sorted(set(metrics) - set(MAIN_METRICS) - beside)
    rows = []
    for name in names:
        entry = metrics[name] if isinstance(metrics[name], dict) else {"value": metrics[name]}
        low, high = entry.get("ci95") or (None, None)
        of_units = (metrics.get(OF_UNITS + name) or {}).get("value")
        rows.append((name, entry.get("value"), low, high, of_units, entry.get("formula", "")))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "units", "formula"])


@dataclass(frozen=True)
class Baseline:
    """The layer's own units in an eval.json: how many, their L0 and participation ratio; the k largest; the verdict."""

    n_units: int
    l0: float
    participation_ratio: float
    k: int
    largest: dict[str, float | None]  # l0, fvu, delta_ce, ce_loss_score_zero … of the k largest
    verdict: str | None


def baseline_of(report: dict[str, Any]) -> Baseline | None:
    """None for an evaluation that did not measure it, as those of version 0.1, or found no token."""
    units, metrics = report.get("units") or {}, report.get("metrics") or {}
    values = {name: entry.get("value") for name, entry in metrics.items() if isinstance(entry, dict)}
    l0, ratio = values.get("units_l0"), values.get("units_participation_ratio")
    if "k" not in units or l0 is None or ratio is None:
        return None
    largest = {name.removeprefix(OF_UNITS): value for name, value in values.items() if name.startswith(OF_UNITS)}
    return Baseline(units["n_units"], l0, ratio, units["k"], largest, units.get("verdict"))


def site_table(report: dict[str, Any]) -> pd.DataFrame:
    """A crosscoder's metrics, a row each, in a column for each site and for all sites of a model at once."""
    titles = {f"site_{n}": f"site {n}" for n in range(1, len(report.get("sites") or []) + 1)}
    titles |= {f"model_{n}": f"all of model {n}" for n in range(1, len(report.get("models") or []) + 1)}
    cells: dict[str, dict[str, Any]] = {}
    for name, entry in (report.get("metrics") or {}).items():
        for place, title in titles.items():
            if name.endswith(f"_{place}"):
                cells.setdefault(name.removesuffix(f"_{place}"), {})[title] = entry.get("value")
    return pd.DataFrame([{"metric": metric, **values} for metric, values in cells.items()])


def share_table(report: dict[str, Any], control: dict[str, Any]) -> pd.DataFrame:
    """The histogram of each site's share in a feature's decoder norms: site, low, high, features, control.

    Of two sites only the second is there; the first's share is 1 − it. `control` counts the features of the control's
    evaluation (empty: none), scaled to as many features as there are here.
    """
    found, theirs = (each.get("norm_share") or {} for each in (report, control))
    histogram = found.get("histogram") or {}
    edges, counts = histogram.get("edges") or [], histogram.get("features") or []
    scale = (found.get("features") or 0) / max(1, theirs.get("features") or 0)
    beside = (theirs.get("histogram") or {}).get("features") or [[None] * len(each) for each in counts]
    rows = [
        {"site": n, "low": low, "high": high, "features": count, "control": None if other is None else other * scale}
        for n, (mine, its) in enumerate(zip(counts, beside, strict=True), 1)
        if n > 1 or len(counts) != 2
        for low, high, count, other in zip(edges[:-1], edges[1:], mine, its, strict=True)
    ]
    return pd.DataFrame(rows, columns=["site", "low", "high", "features", "control"])


def control_of(entry: SaeEntry, entries: Iterable[SaeEntry]) -> SaeEntry | None:
    """The evaluated control of a crosscoder: the same run beside it, with its sites paired at random in training."""
    for other in entries:
        beside = other.path.parent == entry.path.parent and is_control_of(other.config, entry.config)
        if beside and (other.path / "eval.json").is_file():
            return other
    return None


def group_table(groups: dict[str, Any], named: str) -> pd.DataFrame:
    """One row per group of `{group: {metric: value or {"value": …}}}`, e.g. per domain or control."""
    rows = []
    for group, values in groups.items():
        if isinstance(values, dict):
            plain = {k: v.get("value") if isinstance(v, dict) else v for k, v in values.items()}
            rows.append({named: group} | {k: v for k, v in plain.items() if isinstance(v, int | float | type(None))})
    table = pd.DataFrame(rows)
    return table.sort_values("tokens", ascending=False) if "tokens" in table else table


def density_table(report: dict[str, Any]) -> pd.DataFrame:
    """The density histogram of an eval.json: low, high (log₁₀ density), count; empty if it has none."""
    density = report.get("density") or {}
    edges, counts = density.get("log10_density_edges") or [], density.get("features") or []
    if len(edges) != len(counts) + 1:
        return pd.DataFrame({"low": [], "high": [], "count": []})
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": counts})


def clusters(histogram: pd.DataFrame) -> list[tuple[float, float, int]]:
    """(low, high, features) of the clusters of a density histogram, split at its deepest gaps.

    Two clusters are separate where the smoothed count between them falls to a third of the smaller peak; the
    ultra-low-density cluster of Bricken et al. 2023 is one.
    """
    if not histogram["count"].sum():
        return []
    count = histogram["count"].to_numpy(float)
    smooth = np.convolve(np.pad(count, 1), [0.25, 0.5, 0.25], "valid")
    bounds, start = [], 0
    peaks = [i for i in range(len(smooth)) if smooth[i] == smooth[max(0, i - 2) : i + 3].max() and smooth[i] > 0]
    peaks = [p for i, p in enumerate(peaks) if i == 0 or p - peaks[i - 1] > 2]
    for left, right in zip(peaks, peaks[1:], strict=False):
        valley = left + int(np.argmin(smooth[left : right + 1]))
        if smooth[valley] <= min(smooth[start : valley + 1].max(), smooth[right]) / 3:
            bounds.append((start, valley + 1))
            start = valley + 1
    bounds.append((start, len(count)))
    found = []
    for lo, hi in bounds:
        filled = lo + np.flatnonzero(count[lo:hi])
        if len(filled):
            low, high = histogram["low"].iloc[filled[0]], histogram["high"].iloc[filled[-1]]
            found.append((float(low), float(high), int(count[lo:hi].sum())))
    return found


def headline_metrics(entry: SaeEntry) -> dict[str, float | None]:
    """l0, fvu and ce_loss_score (against zero-ablation) of the dictionary's eval.json; None where it has none."""
    metrics = read_config(entry.path / "eval.json").get("metrics") or {}
    keys = {"l0": "l0", "fvu": "fvu", "ce_loss_score": "ce_loss_score_zero"}
    return {name: (metrics.get(key) or {}).get("value") for name, key in keys.items()}


@dataclass(frozen=True)
class Summary:
    """A line of the start page. `state` is "in training", "just started", "stopped", "trained", "evaluated", "indexed"
    or "imported pages"; `progress` is the share of the tokens seen, None unless training is unfinished."""

    entry: SaeEntry
    recipe: str
    d_in: int | None
    l0: float | None
    ce_loss_score: float | None
    state: str
    progress: float | None = None


def summary(entry: SaeEntry, now: float | None = None) -> Summary:
    """What the start page says about a dictionary; only an unfinished one's log is read."""
    metrics = headline_metrics(entry)
    state, progress = _state(entry, now)
    d_in = entry.config.get("d_in")
    return Summary(
        entry,
        recipe=str(entry.config.get("recipe") or "?"),
        d_in=d_in if isinstance(d_in, int) else None,
        l0=metrics["l0"],
        ce_loss_score=metrics["ce_loss_score"],
        state=state,
        progress=progress,
    )


def _state(entry: SaeEntry, now: float | None) -> tuple[str, float | None]:
    if entry.is_dump:
        return "imported pages", None
    if entry.unfinished:
        found = progress_of(entry, read_log(entry.path / "metrics.jsonl"), now)
        name = {"training": "in training", "empty": "just started", "stopped": "stopped"}[found.state]
        return name, found.rows / max(1, found.total)
    if entry.has_index:
        return "indexed", None
    return ("evaluated" if (entry.path / "eval.json").is_file() else "trained"), None


def frontier(entry: SaeEntry, entries: Iterable[SaeEntry]) -> pd.DataFrame:
    """The evaluated dictionaries in the same directory (a sweep): id, recipe, d_sae, l0, fvu, ce_loss_score, this.

    `units_k`, `units_l0` and `units_fvu` are of the k largest of the layer's own units, k being the dictionary's L0.
    """
    rows = []
    for other in entries:
        if other.path.parent != entry.path.parent:
            continue
        values = headline_metrics(other)
        if values["l0"] is not None and values["fvu"] is not None:
            recipe = str(other.config.get("recipe", "?"))
            own = baseline_of(read_config(other.path / "eval.json"))
            largest = {"k": own.k, "l0": own.largest["l0"], "fvu": own.largest["fvu"]} if own else {}
            rows.append(
                {"id": other.id, "recipe": recipe, "d_sae": other.d_sae, **values, "this": other.id == entry.id}
                | {f"units_{name}": largest.get(name) for name in ("k", "l0", "fvu")}
            )
    return pd.DataFrame(rows)


def cost(entry: SaeEntry, log: pd.DataFrame) -> dict[str, str]:
    """The cost of a run: training time (from the logged speed), speed, sizes of its files."""
    found = {}
    if {"rows", "rows_per_s"} <= set(log.columns) and len(log):
        steps = np.diff(log["rows"].to_numpy(float), prepend=0.0)
        seconds = float((steps / log["rows_per_s"].clip(lower=1).to_numpy(float)).sum())
        found["training"] = f"{seconds / 60:.1f} min"
        found["pace"] = f"{log['rows'].iloc[-1] / max(seconds, 1e-9):,.0f} tokens/s"
    for name in ("sae.safetensors", "state.safetensors", "features.zarr"):
        size = _size(entry.path / name)
        if size:
            found[name] = f"{size / 1e6:,.1f} MB"
    return found


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0
