"""The evaluation of a crosscoder as a table for a terminal."""

from __future__ import annotations

from typing import Any

BAR = 40  # characters of the longest bar


def crosscoder_table(result: dict[str, Any]) -> str:
    """An eval.json of a crosscoder: metrics, how many features belong to which sites, and the histogram of shares."""
    lines = [f"held-out tokens: {result['tokens']:,}"]
    lines += [
        f"site {n}: {site['name']} ({site['width']:,} wide, scaled by {site['scale']:.4g})"
        for n, site in enumerate(result["sites"], 1)
    ]
    if result["shuffled_in_training"]:
        lines.append("a control: in training, the sites' rows were paired at random")
    lines += ["", f"{'metric':18} {'value':>9}  {'95% interval':20} formula"]
    for name, entry in result["metrics"].items():
        interval = "" if not entry["ci95"] else f"[{_number(entry['ci95'][0])}, {_number(entry['ci95'][1])}]"
        lines.append(f"{name:18} {_number(entry['value']):>9}  {interval:20} {entry['formula']}")
    return "\n".join([*lines, "", *_share_lines(result["norm_share"]), "", *_cosine_lines(result["cosine"])]).rstrip()


def _share_lines(shares: dict[str, Any]) -> list[str]:
    """The counts, and the histogram: of two sites the second's share (1 − the first's), of more each site's."""
    low, high = shares["shared_between"]
    lines = [
        f"share of each site in a feature's decoder norms: {shares['formula']}",
        *(
            f"at site {n} alone (share above {shares['one_site_above']}): {count:,} of {shares['features']:,} features"
            for n, count in enumerate(shares["one_site"], 1)
        ),
        f"at all sites alike (every share from {low:.2f} to {high:.2f}): {shares['shared']:,}",
    ]
    edges, counts = shares["histogram"]["edges"], shares["histogram"]["features"]
    for n, count in enumerate(counts, 1):
        if n == 1 and len(counts) == 2:
            continue
        lines += ["", f"share of site {n:<6} features"]
        largest = max(1, *count)
        lines += [
            f"{low:.2f} to {high:.2f}  {features:>12,}  {'#' * round(BAR * features / largest)}".rstrip()
            for low, high, features in zip(edges, edges[1:], count, strict=False)
        ]
    return lines


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
