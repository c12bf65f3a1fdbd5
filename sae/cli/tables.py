"""Results as tables for a terminal."""

from __future__ import annotations

from typing import Any

NOTABLE_VARIANCE_SHARE = 0.1
SHOWN = (
    "l0",
    "fvu",
    "fvu_without_outliers",
    "ce_loss_score_zero",
    "ce_loss_score_mean",
    "ce_loss_score_resample",
    "delta_ce",
    "kl",
    "ce_clean",
    "ce_sae",
    "ce_zero",
    "ce_mean",
    "ce_resample",
    "cosine",
    "relative_norm",
    "shrinkage",
    "dead_share",
    "ultra_low_share",
)


def eval_table(result: dict[str, Any]) -> str:
    """An eval.json: the metrics with intervals and formulas, the domains, and a comparison with the paper's A/1."""
    lines = [f"held-out tokens: {result['tokens']:,}"]
    if "transcodes" in result:
        read, predicted = result["transcodes"]["x"], result["transcodes"]["y"]
        lines.append(f"a transcoder from {read}: x in the formulas is its target y, the activations at {predicted}")
    lines += ["", f"{'metric':22} {'value':>9}  {'95% interval':20} formula"]
    for name in SHOWN:
        entry = result["metrics"].get(name)
        if entry is None:
            continue
        interval = "" if not entry["ci95"] else f"[{_number(entry['ci95'][0])}, {_number(entry['ci95'][1])}]"
        lines.append(f"{name:22} {_number(entry['value']):>9}  {interval:20} {entry['formula']}")
    if "ce_clean" not in result["metrics"]:
        lines.append("not measured: the metrics of the model's losses (ce_…, delta_ce, kl); these activations came as")
        lines.append("arrays, without a model that can be run")
    lines += _row_lines(result)
    if result["checks"].get("scores_are_noise"):
        gap = _number(result["checks"]["ablation_gap_nats"])
        lines.append(f"note: zero ablation costs only {gap} nats here, so the loss scores are noise")
    quantiles = "  ".join(f"{name} {value}" for name, value in result["l0"]["quantiles"].items())
    lines += ["", f"active features per token: {quantiles}"]
    parts = [lines, _units_lines(result), _domain_lines(result), _a1_lines(result["beside_a1"])]
    return "\n\n".join("\n".join(part) for part in parts)


BESIDE_UNITS = ("l0", "fvu", "delta_ce", "ce_loss_score_zero", "ce_loss_score_mean")


def _units_lines(result: dict[str, Any]) -> list[str]:
    """The dictionary next to as many of the layer's own units, and a sentence if it is not better."""
    units, metrics = result["units"], result["metrics"]
    l0, ratio = (_number(metrics[name]["value"]) for name in ("units_l0", "units_participation_ratio"))
    lines = [
        f"the layer's own units: {units['n_units']:,}, of which {l0} are not 0 per token; participation ratio {ratio}",
        f"{'':22} {'dictionary':>10} {'largest units':>14}  k = {units['k']:,} units, the largest by absolute value",
    ]
    lines += [
        f"{name:22} {_number(metrics[name]['value']):>10} {_number(metrics[f'topk_units_{name}']['value']):>14}"
        for name in BESIDE_UNITS
        if name in metrics
    ]
    gain = metrics.get("ce_gain_over_units")
    if gain is None:  # activations that came without a model
        return [*lines, f"note: {units['verdict']}"] if units["verdict"] else lines
    low, high = (_number(end) for end in gain["ci95"])
    lines.append(f"{'ce_gain_over_units':22} {_number(gain['value']):>10}  [{low}, {high}] {gain['formula']}")
    return [*lines, f"note: {units['verdict']}"] if units["verdict"] else lines


def _row_lines(result: dict[str, Any]) -> list[str]:
    """What a row filter leaves out, and a note if few rows decide the FVU."""
    lines = []
    if "row_filter" in result:
        left = result["row_filter"]
        share = left["rows_left_out"] / (left["rows"] + left["rows_left_out"])
        lines.append(
            f"row filter: {left['rows_left_out']:,} rows ({share:.2%}) are left out of all figures; fvu with them: "
            f"{_number(left['fvu_all_rows']['value'])}"
        )
    shares = [result["metrics"].get(name, {}).get("value") for name in ("outlier_share", "outlier_variance_share")]
    if shares[0] is not None and (shares[1] or 0) > NOTABLE_VARIANCE_SHARE:
        lines.append(
            f"note: {shares[0]:.2%} of the rows carry {shares[1]:.0%} of the variance, so fvu is mostly about them; "
            "read fvu_without_outliers. See the page Sinks and outliers"
        )
    return lines


def _domain_lines(result: dict[str, Any]) -> list[str]:
    """One line per domain, the one with the most tokens first."""
    quality = result["domains"]
    lines = [
        f"{'domain':20} {'tokens':>9} {'l0':>7} {'fvu':>8} {'delta_ce':>9} {'CE score':>8} {'best F1':>8} {'pure':>5}"
    ]
    for domain, entry in sorted(result["by_domain"].items(), key=lambda item: -item[1]["tokens"]):
        best = quality["best_feature"][domain]
        lines.append(
            f"{domain:20} {entry['tokens']:>9,} {_number(entry['l0']):>7} {_number(entry['fvu']):>8} "
            f"{_number(entry.get('delta_ce')):>9} {_number(entry.get('ce_loss_score_zero')):>8} "
            f"{_number(best and best['f1']):>8} {quality['pure_by_domain'][domain]:>5}"
        )
    return [
        *lines,
        f"pure features (of one domain): {quality['pure_features']:,}; mean best F1: {_number(quality['mean_f1'])}",
        quality["formula"],
    ]


def _a1_lines(beside: dict[str, Any]) -> list[str]:
    lines = [f"{'':22} {'here':>9} {'A/1':>9}  {beside['source']}"]
    for name, entry in beside["statistics"].items():
        lines.append(f"{name:22} {_small(entry['value']):>9} {_small(entry['a1']):>9}  {entry['formula']}")
    return lines


def compare_table(result: dict[str, Any]) -> str:
    """A compare.json: counts, summaries next to the published ones, and where the tables were written."""
    a, b, counts = result["a"], result["b"], result["counts"]
    lines = [
        *(
            f"{side}  {named['name']}: {count['features']:,} features of {named['model']['id']}, of which "
            f"{count['analysed']:,} fired on at least {result['min_firings']} tokens"
            for side, named, count in (("A", a, counts["a"]), ("B", b, counts["b"]))
        ),
        f"{result['tokens']:,} tokens; {counts['a']['matched']:,} features matched one to one (Pearson above "
        f"{result['match_floor']}), {counts['a']['unmatched']:,} of A and {counts['b']['unmatched']:,} of B unmatched; "
        f"{counts['edges']:,} splitting edges (masked cosine of at least {result['edge_masked']})",
        "",
        f"{'measure':20} {'n':>7} {'median':>8} {'mean':>8} {'p5':>8} {'p95':>8} {'paper':>7}",
    ]
    for name, entry in result["summary"].items():
        published = result["published"].get(name)
        lines.append(
            f"{name:20} {entry['n']:>7,} {_number(entry['median']):>8} {_number(entry['mean']):>8} "
            f"{_number(entry['p5']):>8} {_number(entry['p95']):>8} {'' if published is None else published:>7}  "
            f"{entry['formula']}"
        )
    return "\n".join(
        [*lines, "", f"paper: the median in {result['published']['source']}", f"written to {result['path']}"]
    )


def controls_table(result: dict[str, Any]) -> str:
    """A controls.json: one line per dictionary, the measured one first, then what each control is."""
    names = ("l0", "fvu", "ce_loss_score_zero", "delta_ce", "dead_share", "mean_f1", "top_neuron", "nearest_cosine")
    lines = [
        f"{result['tokens']:,} held-out tokens; controls have {result['k']} active features per token",
        "",
        f"{'dictionary':15} {'features':>8} "
        + " ".join(f"{name[:10]:>10}" for name in names)
        + f" {'pure':>5} {'absorbed':>8} probe k=1, 2, 5",
    ]
    for name, entry in result["measured"].items():
        lines.append(
            f"{name:15} {entry['features']:>8,} "
            + " ".join(f"{_number(entry[column]):>10}" for column in names)
            + f" {entry['pure_features']:>5,} {_number((entry['absorption'] or {}).get('mean')):>8} "
            + " ".join(_number(value) for value in entry["probe"].values())
        )
    meanings = [f"{name}: {meaning}" for name, meaning in {**result["meaning"], **result["skipped"]}.items()]
    return "\n".join([*lines, "", *meanings])


def feature_table(found: dict[str, Any]) -> str:
    """One feature as `pipeline.describe_feature` describes it; in the examples the firing token is in brackets."""
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float) and name != "feature"}
    lines = [f"feature {found['feature']}", "  ".join(f"{name} {value:,.4g}" for name, value in numbers.items())]
    for name in ("fires_on", "raises", "lowers"):
        shown = "  ".join(f"{token!r} {value:.3g}" for token, value in found.get(name, {}).items())
        lines.append(f"{name.replace('_', ' '):9} {shown or 'nothing'}")
    for each in found["examples"]:
        where = f"{each['activation']:8.3f}  {each['domain'][:12]:12}"
        lines.append(f"{where}  {each['before']}[{each['token']}]{each['after']}")
    return "\n".join(lines)


def found_table(found: dict[str, Any]) -> str:
    """The features that `pipeline.search` found, one line each: feature, similarity, your label, text."""
    from sae.pipeline.info import visible

    lines = [f"{'feature':>9} {'similarity':>10}  text"]
    for each in found["features"]:
        own = f"“{each['label']}”  " if each["label"] else ""
        lines.append(f"{each['feature']:>9,} {each['similarity']:>10.3f}  {visible((own + each['text']).encode())}")
    lines.append(f"{'':9} {_small(found['median_similarity']):>10}  (the median feature)")
    return "\n".join(lines)


def description(found: dict[str, Any], indent: int = 0) -> str:
    """A nested description, indented by level."""
    lines = []
    for name, value in found.items():
        pad = "  " * indent
        if isinstance(value, dict):
            lines += [f"{pad}{name}:", description(value, indent + 1)]
        else:
            lines.append(f"{pad}{name}: {value}")
    return "\n".join(lines)


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
