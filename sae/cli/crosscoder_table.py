"""The evaluation of a crosscoder as a table for a terminal."""

from __future__ import annotations

from typing import Any

BAR = 30  # characters of the longest bar
NO_CONTROL = (
    "no control was found: train this run once more with --set shuffle_sites=true into a directory beside this one, "
    "and evaluate it; what looks shared there is an artefact"
)


def crosscoder_table(result: dict[str, Any], control: dict[str, Any] | None = None) -> str:
    """An eval.json of a crosscoder: metrics, how many features belong to which sites, and the histogram of shares.

    `control`: the eval.json of its control, with its `directory`, to stand beside the shares.
    """
    lines = [f"held-out tokens: {result['tokens']:,}"]
    lines += [
        f"site {n}: {site['name']} ({site['width']:,} wide, scaled by {site['scale']:.4g})"
        for n, site in enumerate(result["sites"], 1)
    ]
    if result["shuffled_in_training"]:
        lines.append("a control: in training, the sites' rows were paired at random")
    lines += [*_metric_lines(result), *_note_lines(result)]
    lines += ["", *_share_lines(result, control), "", *_cosine_lines(result["cosine"])]
    return "\n".join(lines).rstrip()


def _metric_lines(result: dict[str, Any]) -> list[str]:
    """The metrics of all sites, then those of each place where x̂ takes the place of x."""
    sites = [f"site_{n}" for n in range(1, len(result["sites"]) + 1)]
    joint = [f"model_{n}" for n in range(1, len(result["models"]) + 1)]
    placed = {where: {k: v for k, v in result["metrics"].items() if k.endswith(f"_{where}")} for where in sites + joint}
    of_all = {k: v for k, v in result["metrics"].items() if not any(k in entries for entries in placed.values())}
    titles = {"": "all sites"} | {where: where.replace("_", " ") for where in placed}
    titles |= {where: f"{where.replace('_', ' ')}, all its sites at once" for where in joint}
    lines = []
    for where, entries in {"": of_all, **placed}.items():
        if entries:
            lines += ["", f"{titles[where]:22} {'value':>9}  {'95% interval':20} formula"]
        for name, entry in entries.items():
            interval = "" if not entry["ci95"] else f"[{_number(entry['ci95'][0])}, {_number(entry['ci95'][1])}]"
            shown = name.removesuffix(f"_{where}")
            lines.append(f"{shown:22} {_number(entry['value']):>9}  {interval:20} {entry['formula']}")
    return lines


def _note_lines(result: dict[str, Any]) -> list[str]:
    """What is not measured, or is noise."""
    measured = {n for model in result["models"] for n in model["sites"]}
    lines = [
        f"not measured at site {n}: the losses; its activations came as arrays, without a model that can be run"
        for n in range(1, len(result["sites"]) + 1)
        if n not in measured
    ]
    lines += [
        f"note: zero ablation at {where.replace('_', ' ')} costs only {_number(check['ablation_gap_nats'])} nats, so "
        "its loss scores are noise"
        for where, check in result["checks"].items()
        if check["scores_are_noise"]
    ]
    if "row_filter" in result:
        left = result["row_filter"]
        share = left["rows_left_out"] / (left["rows"] + left["rows_left_out"])
        lines.append(f"row filter: {left['rows_left_out']:,} rows ({share:.2%}) are left out of all figures")
    return ["", *lines] if lines else []


def _share_lines(result: dict[str, Any], control: dict[str, Any] | None) -> list[str]:
    """The counts and the histogram: of two sites the second's share (1 − the first's), of more each site's."""
    shares, beside = result["norm_share"], (control or {}).get("norm_share")
    low, high = shares["shared_between"]
    lines = [f"share of each site in a feature's decoder norms: {shares['formula']}"]
    if control:
        lines.append(f"beside it the control, {control['directory']}: trained on rows of the sites paired at random")
    elif not result["shuffled_in_training"]:
        lines.append(NO_CONTROL)
    alone = [f"at site {n} alone (share above {shares['one_site_above']})" for n in range(1, len(result["sites"]) + 1)]
    what = [*alone, f"at all sites alike (every share from {low:.2f} to {high:.2f})", "active features"]
    lines += ["", f"{'features':54} {'here':>8}" + (f" {'control':>8}" if beside else "")]
    for name, here, theirs in zip(what, _counts(shares), _counts(beside or shares), strict=True):
        lines.append(f"{name:54} {here:>8,}" + (f" {theirs:>8,}" if beside else ""))
    edges, histogram = shares["histogram"]["edges"], shares["histogram"]["features"]
    for n, count in enumerate(histogram, 1):
        if n == 1 and len(histogram) == 2:
            continue
        of_control = beside["histogram"]["features"][n - 1] if beside else [None] * len(count)
        lines += ["", f"{f'share of site {n}':18} {'features':>8}" + (f" {'control':>8}" if beside else "")]
        largest = max(1, *count)
        for start, end, features, theirs in zip(edges, edges[1:], count, of_control, strict=False):
            cells = f"{f'{start:.2f} to {end:.2f}':18} {features:>8,}" + ("" if theirs is None else f" {theirs:>8,}")
            lines.append(f"{cells}  {'#' * round(BAR * features / largest)}".rstrip())
    return lines


def _counts(shares: dict[str, Any]) -> list[int]:
    return [*shares["one_site"], shares["shared"], shares["features"]]


def _cosine_lines(cosines: list[dict[str, Any]]) -> list[str]:
    """The distribution of the cosine of the two decoder rows, for each pair of sites."""
    if not cosines:
        return ["the sites have different widths, so their decoder rows have no cosine"]
    return [
        f"cosine of decoder rows at {' and '.join(entry['sites'])}: median {_number(entry['median'])}, 5% "
        f"{_number(entry['p5'])}, 95% {_number(entry['p95'])} ({entry['formula']})"
        for entry in cosines
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
