"""Named training recipes: each a small composition of activation, loss, constraints and cure for dead features."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from sae.config import TrainConfig, with_overrides


@dataclass(frozen=True)
class Recipe:
    """What distinguishes a recipe besides numbers; `defaults` are the TrainConfig fields it sets."""

    name: str
    summary: str
    source: str
    activation: str
    encoder_init: str  # "kaiming" or "data", see optim.initialise_
    resample: str  # "loss": the paper's, optim.resample_; "rank": optim.reseed_; "": none
    defaults: dict[str, Any]


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="towards-monosemanticity",
            summary="ReLU + L1, tied pre-bias from the geometric median, unit-norm decoder, loss²-weighted resampling",
            source="Bricken et al. 2023, appendix",
            activation="relu",
            encoder_init="kaiming",
            resample="loss",
            defaults={"l1": 10.0, "decay_share": 0.0, "resample_shares": (0.1, 0.2, 0.3, 0.4)},
        ),
        Recipe(
            name="topk",
            summary="ReLU of the k largest, started from the data, AuxK (1/32) and reseeding for dead ones",
            source="Gao et al. 2024 (arXiv 2406.04093)",
            activation="topk",
            encoder_init="data",
            # AuxK alone loses features for good once the error is small: what it teaches them no longer wins a place
            # among the k. Reseeded in the middle of the k of an input that wants them, they stay.
            resample="rank",
            defaults={
                "k": 20,
                "aux_coefficient": 1 / 32,
                "decay_share": 0.8,
                "resample_shares": (0.4, 0.55, 0.7, 0.8, 0.9),
            },
        ),
    )
}


def recipe_named(name: str) -> Recipe:
    """Raises: ValueError for an unknown name, with the nearest one and the list."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no recipe {name!r}.{hint} Recipes: {', '.join(RECIPES)}.")
    return RECIPES[name]


def resolve(name: str, **overrides: Any) -> tuple[Recipe, TrainConfig]:
    """The recipe and its full configuration; `overrides` replace its defaults.

    Raises: ValueError for an unknown recipe or setting, and for settings the recipe has no use for.
    """
    recipe = recipe_named(name)
    config = with_overrides(TrainConfig(recipe=name, **recipe.defaults), overrides)
    if config.recipe != name:
        raise ValueError(f"the recipe is {name}, but the settings say recipe = {config.recipe!r}. Name one of them.")
    if recipe.resample and config.exact and config.steps <= config.resample_steps[0]:
        raise ValueError(
            f"recipe {name}: --exact resamples after {config.resample_steps[0]:,} steps, and this run has "
            f"{config.steps:,}. Give more tokens, or leave --exact to resample at shares of the run."
        )
    if recipe.activation == "topk" and config.k < 1:
        raise ValueError(f"recipe {name}: k must be at least 1, got {config.k}.")
    if recipe.activation == "topk" and config.l1:
        raise ValueError(f"recipe {name} has no L1 penalty (its sparsity is k); got l1 = {config.l1}.")
    if recipe.activation != "topk" and config.k:
        raise ValueError(f"recipe {name} has no k (its sparsity comes from l1); got k = {config.k}.")
    return recipe, config
