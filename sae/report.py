"""Figures as text for a terminal."""

from __future__ import annotations

from typing import Any

SHOWN = (
    "l0", "fvu", "ce_loss_score_zero", "ce_loss_score_mean", "delta_ce", "ce_clean", "ce_sae", "ce_zero", "ce_mean",
    "cosine", "shrinkage", "dead_share", "ultra_low_share",
)  # fmt: skip


def eval_table(result: dict[str, Any]) -> str:
    """The metrics of an eval.json with their intervals and formulas, then the domains, most tokens first."""
    lines = [f"held-out tokens: {result['tokens']:,}", ""]
    for name in SHOWN:
        entry = result["metrics"][name]
        interval = "" if not entry["ci95"] else f"[{_number(entry['ci95'][0])}, {_number(entry['ci95'][1])}]"
        lines.append(f"{name:20} {_number(entry['value']):>9}  {interval:20} {entry['formula']}")
    if result["checks"]["scores_are_noise"]:
        gap = _number(result["checks"]["ablation_gap_nats"])
        lines.append(f"note: zero-ablation costs only {gap} nats here, so the loss scores are noise")
    lines += ["", f"{'domain':20} {'tokens':>9} {'l0':>7} {'fvu':>8} {'delta_ce':>9} {'score':>7}"]
    domains = sorted(result["by_domain"].items(), key=lambda item: -item[1]["tokens"])
    for domain, entry in domains:
        lines.append(
            f"{domain:20} {entry['tokens']:>9,} {_number(entry['l0']):>7} {_number(entry['fvu']):>8} "
            f"{_number(entry['delta_ce']):>9} {_number(entry['ce_loss_score_zero']):>7}"
        )
    return "\n".join(lines)


def compare_table(result: dict[str, Any]) -> str:
    """The summaries of a compare.json, the published ones beside them, and where the tables lie."""
    a, b, counts = result["a"], result["b"], result["counts"]
    lines = [
        f"A  {a['name']}: {counts['a']['features']:,} features of {a['model']['id']}, "
        f"{counts['a']['analysed']:,} fired on {result['min_firings']} tokens or more",
        f"B  {b['name']}: {counts['b']['features']:,} features of {b['model']['id']}, {counts['b']['analysed']:,} did",
        f"{result['tokens']:,} tokens; {counts['a']['matched']:,} matched one to one (pairs above "
        f"{result['match_floor']}), alone {counts['a']['unmatched']:,} of A and {counts['b']['unmatched']:,} of B; "
        f"{counts['edges']:,} splitting edges (masked cosine ≥ {result['edge_masked']})",
        "",
        f"{'':20} {'n':>7} {'median':>8} {'mean':>8} {'p5':>8} {'p95':>8} {'paper':>7}",
    ]
    for name, entry in result["summary"].items():
        published = result["published"].get(name)
        lines.append(
            f"{name:20} {entry['n']:>7,} {_number(entry['median']):>8} {_number(entry['mean']):>8} "
            f"{_number(entry['p5']):>8} {_number(entry['p95']):>8} {'' if published is None else published:>7}  "
            f"{entry['formula']}"
        )
    return "\n".join([*lines, "", f"paper: median, {result['published']['source']}", f"written: {result['path']}"])


def description(found: dict[str, Any], indent: int = 0) -> str:
    """A nested description as indented lines."""
    lines = []
    for name, value in found.items():
        pad = "  " * indent
        if isinstance(value, dict):
            lines += [f"{pad}{name}:", description(value, indent + 1)]
        else:
            lines.append(f"{pad}{name}: {value}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
