"""Each metric from its sums, against plain numpy on the rows themselves; the bootstrap against theory."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sae.cli.tables import description
from sae.evaluation import feature_stats, metrics


def sums_of(n_contexts: int = 40, rows_each: int = 25, seed: int = 0) -> tuple[dict[str, np.ndarray], dict]:
    """Per-context sums, and the rows they are sums of."""
    rng = np.random.default_rng(seed)
    raw = {
        "x": rng.normal(1, 2, (n_contexts, rows_each, 3)),
        "l0": rng.integers(0, 9, (n_contexts, rows_each)),
        **{
            f"ce_{name}": rng.gamma(2, size, (n_contexts, rows_each))
            for name, size in {
                "clean": 1.0,
                "sae": 1.2,
                "zero": 2.0,
                "mean": 1.9,
                "resample": 2.1,
                "units": 1.3,
            }.items()
        },
        "kl": rng.gamma(1, 0.1, (n_contexts, rows_each)),
        **{
            name: rng.gamma(size, 1.0, (n_contexts, rows_each))
            for name, size in {
                "units_l0": 9,
                "units_participation": 5,
                "topk_units_l0": 4,
                "topk_units_error": 2,
            }.items()
        },
    }
    raw["x_hat"] = raw["x"] * 0.9 + rng.normal(0, 0.3, raw["x"].shape)
    x, x_hat = raw["x"], raw["x_hat"]
    dot = (x * x_hat).sum(-1)
    inlier = np.linalg.norm(x, axis=-1) < 4
    error, variance = ((x - x_hat) ** 2).sum(-1), ((x - x.mean((0, 1))) ** 2).sum(-1)
    raw["inlier"] = inlier
    sums = {
        "rows": np.full(n_contexts, rows_each, float),
        "predictions": np.full(n_contexts, rows_each, float),
        "l0": raw["l0"].sum(1).astype(float),
        "error": ((x - x_hat) ** 2).sum((1, 2)),
        "variance": ((x - x.mean((0, 1))) ** 2).sum((1, 2)),
        "inlier_rows": inlier.sum(1).astype(float),
        "inlier_error": (error * inlier).sum(1),
        "inlier_variance": (((x - x[inlier].mean(0)) ** 2).sum(-1) * inlier).sum(1),
        "outlier_variance": (variance * ~inlier).sum(1),
        "cosine": (dot / np.linalg.norm(x, axis=-1) / np.linalg.norm(x_hat, axis=-1)).sum(1),
        "hat_hat": (x_hat**2).sum((1, 2)),
        "x_hat": dot.sum(1),
        "kl": raw["kl"].sum(1),
        "norm": np.linalg.norm(x, axis=-1).sum(1),
        "norm_hat": np.linalg.norm(x_hat, axis=-1).sum(1),
        **{name: raw[name].sum(1) for name in raw if name.startswith(("ce_", "units_", "topk_"))},
    }
    assert sums.keys() == set(metrics.SUMS)
    return sums, raw


def test_values_are_ratios_over_the_whole_data_set() -> None:
    sums, raw = sums_of()
    found = {name: entry["value"] for name, entry in metrics.summarise(sums, resamples=10).items()}
    x, x_hat = raw["x"].reshape(-1, 3), raw["x_hat"].reshape(-1, 3)
    inlier = raw["inlier"].reshape(-1)
    ordinary, variance = x[inlier], ((x - x.mean(0)) ** 2).sum(1)
    ce = {name: raw[f"ce_{name}"].mean() for name in ("clean", "sae", "zero", "mean", "resample", "units")}
    wanted = {
        "l0": raw["l0"].mean(),
        "fvu": ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "fvu_without_outliers": ((ordinary - x_hat[inlier]) ** 2).sum() / ((ordinary - ordinary.mean(0)) ** 2).sum(),
        "outlier_share": 1 - inlier.mean(),
        "outlier_variance_share": variance[~inlier].sum() / variance.sum(),
        "cosine": np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, x_hat, strict=True)]),
        "shrinkage": (x_hat**2).sum() / (x * x_hat).sum(),
        **{f"ce_{name}": value for name, value in ce.items()},
        "relative_norm": sum(map(np.linalg.norm, x_hat)) / sum(map(np.linalg.norm, x)),
        "delta_ce": ce["sae"] - ce["clean"],
        "kl": raw["kl"].mean(),
        "ce_loss_score_zero": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "ce_loss_score_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "ce_loss_score_resample": (ce["resample"] - ce["sae"]) / (ce["resample"] - ce["clean"]),
        "units_l0": raw["units_l0"].mean(),
        "units_participation_ratio": raw["units_participation"].mean(),
        "topk_units_l0": raw["topk_units_l0"].mean(),
        "topk_units_fvu": raw["topk_units_error"].sum() / ((x - x.mean(0)) ** 2).sum(),
        "topk_units_delta_ce": ce["units"] - ce["clean"],
        "ce_gain_over_units": ce["units"] - ce["sae"],
        **{
            f"topk_units_ce_loss_score_{name}": (ce[name] - ce["units"]) / (ce[name] - ce["clean"])
            for name in ("zero", "mean", "resample")
        },
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


def test_every_metric_has_a_formula() -> None:
    for name, entry in metrics.summarise(sums_of()[0], resamples=5).items():
        assert entry["formula"], name
        assert entry["version"] >= 1


def test_intervals_contain_the_value_and_have_the_textbook_width() -> None:
    sums, raw = sums_of(n_contexts=400)
    found = metrics.summarise(sums)
    for name, entry in found.items():
        low, high = entry["ci95"]
        assert low < entry["value"] < high, name
    per_context = raw["ce_clean"].mean(1)
    half = 1.96 * per_context.std(ddof=1) / np.sqrt(400)
    low, high = found["ce_clean"]["ci95"]
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_intervals_shrink_with_the_root_of_the_number_of_contexts() -> None:
    def width(n: int, name: str) -> float:
        low, high = metrics.summarise(sums_of(n_contexts=n)[0])[name]["ci95"]
        return high - low

    for name in ("fvu", "ce_sae", "l0", "ce_loss_score_zero"):
        assert width(100, name) / width(1600, name) == pytest.approx(4, rel=0.35), name


def test_the_bootstrap_is_over_contexts_not_tokens() -> None:
    """Rows equal inside a context: the interval must be as wide as if each context were one token."""
    sums, _ = sums_of(n_contexts=50, rows_each=1)
    many = {name: value * 100 for name, value in sums.items()}
    assert metrics.summarise(sums)["fvu"]["ci95"] == pytest.approx(metrics.summarise(many)["fvu"]["ci95"], rel=1e-9)


def test_one_context_has_an_interval_of_no_width() -> None:
    entry = metrics.summarise(sums_of(n_contexts=1)[0])["fvu"]
    assert entry["ci95"] == pytest.approx([entry["value"]] * 2)


@pytest.mark.filterwarnings("error")
def test_nothing_to_divide_by_is_null_and_not_nan() -> None:
    nothing = {name: np.zeros(3) for name in metrics.SUMS}
    found = metrics.summarise(nothing)
    assert all(entry["value"] is None and entry["ci95"] == [None, None] for entry in found.values())
    json.dumps(found, allow_nan=False)
    mixed, _ = sums_of(n_contexts=2)
    for column in mixed.values():
        column[1] = 0
    one, none = grouped(mixed)
    assert all(value is not None for value in one.values())
    assert {value for name, value in none.items() if name != "ci95"} == {None}
    json.dumps(metrics.summarise(mixed), allow_nan=False)


def test_groups_are_the_values_of_their_own_sums() -> None:
    sums, _ = sums_of(n_contexts=4)
    for i, group in enumerate(grouped(sums)):
        alone = metrics.summarise({name: column[i : i + 1] for name, column in sums.items()}, resamples=2)
        for name in metrics.METRICS:
            assert group[name] == pytest.approx(alone[name]["value"], rel=1e-12)


def test_a_group_in_every_context_has_the_intervals_of_the_whole() -> None:
    sums, _ = sums_of(n_contexts=60)
    context = np.repeat(np.arange(60), 2)
    group = np.tile([0, 1], 60)
    halves = {name: np.repeat(column, 2) for name, column in sums.items()}
    whole = metrics.summarise(sums)
    for part in metrics.by_group(halves, context, group, 2, metrics.Bootstrap(60)):
        for name, entry in whole.items():
            assert part["ci95"][name] == pytest.approx(entry["ci95"], rel=1e-9), name


def test_drawing_many_contexts_in_groups_keeps_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, _ = sums_of(n_contexts=1000, rows_each=3)
    alone = metrics.summarise(sums)["ce_sae"]["ci95"]
    monkeypatch.setattr(metrics, "MAX_GROUPS", 300)
    together = metrics.summarise(sums)["ce_sae"]["ci95"]
    assert np.diff(together) == pytest.approx(np.diff(alone), rel=0.15)
    assert together != alone


def grouped(sums: dict[str, np.ndarray]) -> list[dict]:
    """Each context is a separate group."""
    each = np.arange(len(sums["rows"]))
    return metrics.by_group(sums, each, each, len(each), metrics.Bootstrap(len(each)))


def test_dead_and_ultra_low_shares() -> None:
    count = np.array([0, 0, 1, 9, 10, 11, 500_000])
    found = feature_stats.firing_summary(count, 1_000_000)
    assert found["dead_share"]["value"] == pytest.approx(2 / 7)
    assert found["ultra_low_share"]["value"] == pytest.approx(2 / 7)  # 1e-6 and 9e-6; 1e-5 itself is not below
    assert "1,000,000 kept held-out tokens" in found["dead_share"]["formula"]
    few = feature_stats.firing_summary(count, 65_536)["ultra_low_share"]
    assert few["value"] is None  # one firing is more than 1e-5 of so few tokens
    assert "needs more than 100,000 tokens" in few["formula"]


def test_density_histogram_counts_every_feature_once() -> None:
    count = np.array([0, 1, 10, 99, 1000, 1000, 10_000])
    found = feature_stats.density_histogram(count, 10_000)
    assert found["dead"] == [1]
    assert sum(found["features"]) == 6
    edges = np.array(found["log10_density_edges"])
    assert (edges[0], edges[-1], len(edges)) == (-8, 0, len(found["features"]) + 1)
    wanted, _ = np.histogram(np.log10(count[1:] / 10_000), bins=edges)
    assert found["features"] == wanted.tolist()
    assert sum(feature_stats.density_histogram(np.zeros(4, int), 10)["features"]) == 0


def test_descriptions_are_indented() -> None:
    assert description({"a": {"b": 1}, "c": "d"}) == "a:\n  b: 1\nc: d"
