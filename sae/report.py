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
