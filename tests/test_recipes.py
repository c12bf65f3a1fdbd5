"""Settings: refused before any work when wrong, with the nearest name; the paper's counts under `exact`."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.training.config import RECIPE_SPECIFIC, TrainConfig, with_overrides
from sae.training.recipes import RECIPES, recipe_named, resolve


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("towards-monosemanticty", "Did you mean 'towards-monosemanticity'"),
        ("top-k", "Did you mean 'topk'"),
        ("zzz", "Recipes: towards-monosemanticity, anthropic-2024-04, gated"),
    ],
)
def test_an_unknown_recipe_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_named(name)
    with pytest.raises(ValueError, match=f"no recipe '{name}'"):
        resolve(name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_token": 8}, "no setting 'batch_token'. Did you mean 'batch_tokens'"),
        ({"learning": 8}, "no setting 'learning'"),
        ({"qqqq": 8}, "Known settings: recipe, d_sae, tokens"),
        ({"d_sae": 0}, "d_sae must be at least 1, got 0"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"tokens": 10, "batch_tokens": 11}, "less than one batch of 11"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"lr": float("inf")}, "lr must be .*finite"),
        ({"warmup_share": 1.5}, "warmup_share is a share"),
        ({"decay_share": -0.1}, "decay_share is a share"),
        ({"aux_coefficient": -1.0}, "aux_coefficient must not be negative"),
        ({"aux_coefficient": float("nan")}, "aux_coefficient must .*finite"),
        ({"dead_tokens": -1}, "dead_tokens must not be negative"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 5000, "d_sae": 4096}, "k = 5000 is more than d_sae = 4,096"),
        ({"l1": 1.0}, "topk has no L1 penalty"),
        ({"seed": -1}, "seed must not be negative"),
        ({"recipe": "towards-monosemanticity"}, "recipe"),
    ],
)
def test_wrong_settings_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("topk", **overrides)


def test_a_least_density_that_would_fill_k_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4,096 features on min_density = 0.001 .* fill k = 4. .* k / d_sae = 0.001"):
        resolve("balanced", k=4, d_sae=4096, min_density=1e-3)
    assert resolve("balanced", k=4, d_sae=4096)[1].min_density == pytest.approx(0.04 * 4 / 4096)
    assert resolve("balanced", target_l0=8, d_sae=512)[1].min_density == pytest.approx(0.04 * 8 / 512)
    assert resolve("balanced", k=4, d_sae=4096, min_density=0.0)[1].min_density == 0
    assert resolve("matryoshka", target_l0=8, d_sae=512)[1].min_density == pytest.approx(0.04 * 8 / 512)
    assert resolve("jumprelu", target_l0=8, d_sae=512)[1].min_density == pytest.approx(0.04 * 8 / 512)
    assert resolve("jumprelu", d_sae=512)[1].min_density == resolve("batch-topk", d_sae=512)[1].min_density == 0


def test_l1_recipe_refuses_k_and_nan() -> None:
    with pytest.raises(ValueError, match="has no k"):
        resolve("towards-monosemanticity", k=3)
    with pytest.raises(ValueError, match="l1 must .*finite"):
        resolve("towards-monosemanticity", l1=float("nan"))


def test_overrides_replace_and_defaults_stay() -> None:
    recipe, config = resolve("topk", k=3, tokens=10_000, seed=4)
    assert (recipe.name, config.recipe, config.k, config.tokens, config.seed) == ("topk", "topk", 3, 10_000, 4)
    assert config.aux_coefficient == pytest.approx(1 / 32)
    assert TrainConfig(**config.to_dict()) == config
    assert with_overrides(config, {"k": 3}) == config


def test_every_recipe_resolves_and_says_what_it_is() -> None:
    for name, recipe in RECIPES.items():
        assert resolve(name)[0] is recipe
        assert recipe.summary
        assert recipe.source


def test_exact_resampling_counts_are_the_papers() -> None:
    """Bricken et al. 2023: after steps 25k, 50k, 75k, 100k; dead over 12,500 steps; 819,200 inputs."""
    _, config = resolve("towards-monosemanticity", exact=True, tokens=8192 * 1_000_000, batch_tokens=8192)
    assert config.resample_steps == (25_000, 50_000, 75_000, 100_000)
    assert config.resample_window_steps == 12_500
    assert config.resample_window_steps * config.batch_tokens == 102_400_000
    assert config.resample_rows == 819_200
    assert config.steps == 1_000_000


@given(st.integers(1, 10**6), st.integers(1, 5000))
def test_resampling_fits_into_any_run(steps: int, batch: int) -> None:
    _, config = resolve("towards-monosemanticity", tokens=steps * batch, batch_tokens=batch)
    assert config.steps == steps
    assert min(config.resample_steps) >= 1
    assert max(config.resample_steps) <= steps
    assert 1 <= config.resample_window_steps <= max(1, steps // 10)
    assert config.resample_rows <= 819_200
    assert batch <= config.dead_after_tokens <= max(batch, 10_000_000)
    scaled = replace(config, tokens=1000 * batch)
    assert scaled.resample_steps == (100, 200, 300, 400)
    assert scaled.resample_window_steps == max(1, min(100, 100_000 // batch), 12)  # 1/80, but 100,000 rows or 1/10


def test_exact_refuses_a_run_too_short_to_resample() -> None:
    with pytest.raises(ValueError, match="25,000 steps, and this run has 24,999"):
        resolve("towards-monosemanticity", exact=True, tokens=24_999 * 4096)


def test_momentum_must_be_below_one() -> None:
    with pytest.raises(ValueError, match="beta1"):
        resolve("topk", beta1=1.0)


def test_every_wrong_setting_is_named() -> None:
    """Each setting with a range refuses a value outside it, by its name and with the value."""
    wrong: dict[str, Any] = {"matmul": "quick", "beta1": -0.1, "p_end": 0.0, "resample_shares": (0.5, 1.0)}
    wrong |= {"skip_token_ids": (-1,)}
    wrong |= {"prefix_shares": (0.5, 0.25, 1.0), "lr": 0.0} | dict.fromkeys(("d_sae", "tokens", "batch_tokens"), 0)
    for each in fields(TrainConfig):
        if each.metadata.get("check"):
            value = wrong.get(each.name, -1.0)
            with pytest.raises(ValueError, match=f"training: {each.name} .*, got {re.escape(repr(value))}"):
                TrainConfig(**{each.name: value})
    unchecked = {each.name for each in fields(TrainConfig) if not each.metadata.get("check")}
    assert unchecked == {"recipe", "skip", "exact", "calibrate_threshold", "shuffle_sites"}


def test_recipes_refuse_what_they_have_no_use_for() -> None:
    other: dict[str, Any] = {"exact": True, "skip": True, "resample_shares": (0.5,), "prefix_shares": (0.5, 1.0)}
    other |= {"p_end": 0.5, "threshold_lr_ratio": 3.0, "k": 3, "multi_k": 4}
    for name, recipe in RECIPES.items():
        for setting in RECIPE_SPECIFIC - recipe.settings:
            with pytest.raises(ValueError, match=f"recipe {name} has .*; got {setting} = "):
                resolve(name, **{setting: other.get(setting, 0.25)})


def test_the_file_format_is_flat() -> None:
    """train.json and config.json of earlier versions: one flat list of these names."""
    names = "recipe d_sae tokens batch_tokens lr beta1 warmup_share decay_share l1 k aux_coefficient dead_tokens "
    names += "resample_shares seed exact matmul target_l0 l0_penalty penalty_warmup_share rewarm_share clip bandwidth "
    names += "threshold_init threshold_lr_ratio min_density multi_k prefix_shares p_end p_from_share skip "
    # new after version 0.1
    names += "max_norm_multiple skip_positions skip_token_ids calibrate_threshold shuffle_sites precision row_lanes"
    assert set(TrainConfig().to_dict()) == set(names.split())
