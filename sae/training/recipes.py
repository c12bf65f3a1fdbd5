"""Named training recipes: each a small composition of activation, loss, constraints and cure for dead features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from sae.training import objectives
from sae.training.config import TrainConfig, with_overrides

# Settings that only some recipes have a use for; the others refuse them.
OPTIONAL = (
    "k",
    "l1",
    "l0_penalty",
    "aux_coefficient",
    "bandwidth",
    "threshold_init",
    "threshold_lr_ratio",
    "multi_k",
    "min_density",
    "prefix_shares",
    "p_end",
    "p_from_share",
    "skip",
    "exact",
    "resample_shares",
)


@dataclass(frozen=True)
class Recipe:
    """What distinguishes a recipe besides numbers; `defaults` are the TrainConfig fields it sets."""

    name: str
    summary: str
    loss: str
    when: str
    source: str
    activation: str
    objective: objectives.Objective
    encoder_init: str  # "kaiming", "data" or "tied", see optim.initialise_
    resample: str = ""  # "loss": the paper's, optim.resample_; "rank": optim.reseed_; "": none
    coefficient: str = ""  # the setting that is λ; "": sparsity is k
    unit_norm: bool = True  # of decoder rows
    pre_bias: bool = True
    least_share: float = 0.0  # of the mean density k / d_sae: what fires less is ranked higher (min_density)
    needs: str = ""  # of a batch, beside x: "y" (the target) or "resid" (for the model's remaining computation)
    uses: tuple[str, ...] = ()  # of the optional settings, beside those in `defaults`
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def penalised(self) -> str:
        """What λ weighs, against what."""
        if self.needs == "resid":
            return "λ · Σ f beside KL"
        return {"l1": "λ · Σ f", "l0_penalty": "λ · L0", "": "none: sparsity is k"}[self.coefficient]

    @property
    def settings(self) -> set[str]:
        """The optional settings it has a use for."""
        return {*self.defaults, *self.uses} & set(OPTIONAL)


BRICKEN = "Bricken et al. 2023, appendix"
L1_RESAMPLED = {"l1": 10.0, "decay_share": 0.0, "resample_shares": (0.1, 0.2, 0.3, 0.4)}
K_WITH_AUX = {"k": 20, "aux_coefficient": 1 / 32, "decay_share": 0.8}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="towards-monosemanticity",
            summary="ReLU + L1, tied pre-bias from the geometric median, unit-norm decoder, loss²-weighted resampling",
            loss="‖x − x̂‖² + λ Σ f",
            when="to reproduce the paper; features shrink (L1)",
            source=BRICKEN,
            activation="relu",
            objective=objectives.l1,
            encoder_init="kaiming",
            resample="loss",
            coefficient="l1",
            uses=("exact",),
            defaults=L1_RESAMPLED,
        ),
        Recipe(
            name="anthropic-2024-04",
            summary="ReLU + L1 weighed by free decoder norms, λ warm-up, clipped gradients, no resampling",
            loss="‖x − x̂‖² + λ Σ f ‖d‖",
            when="L1 without unit norms or resampling: the baseline of most papers since",
            source="Anthropic, Circuits Updates April 2024; Templeton et al. 2024",
            activation="relu",
            objective=objectives.l1_of_norms,
            encoder_init="tied",
            coefficient="l1",
            unit_norm=False,
            pre_bias=False,
            defaults={"l1": 5.0, "decay_share": 0.2, "penalty_warmup_share": 0.05, "clip": 1.0},
        ),
        Recipe(
            name="gated",
            summary="a gate that chooses and a magnitude that is free of the penalty, sharing weights; resampling",
            loss="‖x − x̂‖² + λ Σ ReLU(π) + ‖x − x̂_frozen(ReLU(π))‖²",
            when="L1 without shrinkage",
            source="Rajamanoharan et al. 2024 (arXiv 2404.16014)",
            activation="gated",
            objective=objectives.gated,
            encoder_init="kaiming",
            resample="loss",
            coefficient="l1",
            uses=("exact",),
            defaults={**L1_RESAMPLED, "beta1": 0.0, "rewarm_share": 0.02},
        ),
        Recipe(
            name="jumprelu",
            summary="a learned threshold per feature and a penalty on L0 itself by straight-through gradients",
            loss="‖x − x̂‖² + λ L0",
            when="the number of active features may vary from token to token; thresholds learn 16 times as fast as the "
            "rest, or they would not reach a low L0 in a short run",
            source="Rajamanoharan et al. 2024 (arXiv 2407.14435)",
            activation="jumprelu",
            objective=objectives.jumprelu,
            encoder_init="data",
            coefficient="l0_penalty",
            pre_bias=False,
            defaults={
                "l0_penalty": 2.0,
                "bandwidth": 0.1,
                "threshold_init": 0.1,
                # Adam moves a threshold by its rate whatever λ weighs: at lr itself one of 10, as an L0 of 2 wants, is
                # out of reach of a short run, and a search for λ then raises it without end and without effect.
                "threshold_lr_ratio": 16.0,
                "beta1": 0.0,
                "penalty_warmup_share": 0.1,
            },
        ),
        Recipe(
            name="topk",
            summary="ReLU of the k largest, started from the data, AuxK (1/32) and reseeding for dead ones",
            loss="‖x − x̂‖² + AuxK (+ L(multi_k · k) / 8)",
            when="exactly k features for every token, as the other tools' TopK",
            source="Gao et al. 2024 (arXiv 2406.04093)",
            activation="topk",
            objective=objectives.topk,
            encoder_init="data",
            # AuxK alone loses features for good once the error is small: what it teaches them no longer wins a place
            # among the k. Reseeded in the middle of the k of an input that wants them, they stay.
            resample="rank",
            uses=("multi_k",),
            defaults={**K_WITH_AUX, "resample_shares": (0.4, 0.55, 0.7, 0.8, 0.9)},
        ),
        Recipe(
            name="batch-topk",
            summary="ReLU of the k · rows largest of the batch, a threshold for inference estimated on the way; AuxK",
            loss="‖x − x̂‖² + AuxK",
            when="k features a token on average, more where a token needs more",
            source="Bussmann et al. 2024 (arXiv 2412.06410)",
            activation="batchtopk",
            objective=objectives.topk,
            encoder_init="data",
            # No reseeding: starts on badly reconstructed rows are starts on outliers, where a whole batch's k · rows
            # can go. Measured on a corpus, k = 2: FVU 22 after an event with nine features in ten dead, 0.27 before.
            uses=("min_density",),
            defaults=K_WITH_AUX,
        ),
        Recipe(
            name="balanced",
            summary="batch-topk in which no feature may fall silent: what fires too rarely is ranked higher",
            loss="‖x − x̂‖²",
            when="first, and the default: k features a token on average, hardly a feature dead",
            source="Bussmann et al. 2024 (arXiv 2412.06410); the balance from Wang et al. 2024 (arXiv 2408.15664)",
            activation="batchtopk",
            objective=objectives.topk,
            encoder_init="data",
            # What counts is lr · steps. Measured on a corpus, 4M rows, batches of 2,048 and of 512: k = 5, FVU 0.081
            # and 0.051; k = 20, 0.0035 and 0.0003. But where the fit is that close, few features do the work and the
            # balance holds up the rest: half as many features of one domain, or named by a rule.
            uses=("min_density",),
            least_share=0.04,
            defaults={"k": 20, "batch_tokens": 2048, "decay_share": 0.8},
        ),
        Recipe(
            name="matryoshka",
            summary="batch-topk whose first features must reconstruct alone, at five sizes",
            loss="Σ over prefixes m of ‖x − x̂_{1…m}‖² + AuxK",
            when="general features that stay whole beside their special cases (less absorption), for some fidelity",
            source="Bussmann et al. 2025 (arXiv 2503.17547)",
            activation="batchtopk",
            objective=objectives.matryoshka,
            encoder_init="data",
            uses=("min_density",),
            defaults={**K_WITH_AUX, "prefix_shares": (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)},
        ),
        Recipe(
            name="p-anneal",
            summary="ReLU with an Lp penalty whose p falls from 1 towards L0, λ rescaled on the way; resampling",
            loss="‖x − x̂‖² + λ Σ f^p, p: 1 → 0.2",
            when="L1's features with less shrinkage",
            source="Karvonen et al. 2024 (arXiv 2408.00113)",
            activation="relu",
            objective=objectives.annealed_lp,
            encoder_init="kaiming",
            resample="loss",
            coefficient="l1",
            defaults={**L1_RESAMPLED, "p_end": 0.2, "p_from_share": 0.5},
        ),
        Recipe(
            name="transcoder",
            summary="ReLU + L1 from an MLP's input to its output, with or without a linear skip",
            loss="‖y − ŷ(x)‖² + λ Σ f",
            when="to see what an MLP computes instead of what it represents",
            source="Dunefsky et al. 2024 (arXiv 2406.11944); skip: Paulo et al. 2025 (arXiv 2501.18823)",
            activation="relu",
            objective=objectives.l1,
            encoder_init="kaiming",
            coefficient="l1",
            pre_bias=False,
            needs="y",
            uses=("skip",),
            defaults={"l1": 5.0, "penalty_warmup_share": 0.05},
        ),
        Recipe(
            name="end-to-end",
            summary="ReLU + L1 where fidelity is the model's own next-token distribution",
            loss="KL(p(x) ‖ p(x̂)) + λ Σ f",
            when="only what the model uses is to be kept",
            source="Braun et al. 2024 (arXiv 2405.12241)",
            activation="relu",
            objective=objectives.end_to_end,
            encoder_init="kaiming",
            resample="loss",
            coefficient="l1",
            needs="resid",
            defaults={**L1_RESAMPLED, "l1": 0.01},
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

    `target_l0` sets k where the recipe has one. Raises: ValueError for an unknown recipe or setting, and for settings
    the recipe has no use for.
    """
    recipe = recipe_named(name)
    config = with_overrides(TrainConfig(recipe=name, **recipe.defaults), overrides)
    if config.recipe != name:
        raise ValueError(f"the recipe is {name}, but the settings say recipe = {config.recipe!r}. Name one of them.")
    if "k" in recipe.settings and config.target_l0:
        config = _with_k_of_target(recipe, config, overrides)
    if recipe.least_share and overrides.get("min_density") is None:
        config = with_overrides(config, {"min_density": recipe.least_share * config.k / config.d_sae})
    _refuse_useless_settings(recipe, config)
    if recipe.resample and config.exact and config.steps <= config.resample_steps[0]:
        raise ValueError(
            f"recipe {name}: --exact resamples after {config.resample_steps[0]:,} steps, and this run has "
            f"{config.steps:,}. Give more tokens, or leave --exact to resample at shares of the run."
        )
    if "k" in recipe.settings and config.k < 1:
        raise ValueError(f"recipe {name}: k must be at least 1, got {config.k}.")
    if config.min_density * config.d_sae >= config.k > 0:
        raise ValueError(
            f"recipe {name}: {config.d_sae:,} features on min_density = {config.min_density:g} of the rows each would "
            f"fill k = {config.k}. Give a min_density well below k / d_sae = {config.k / config.d_sae:.1g}."
        )
    if "bandwidth" in recipe.settings and not config.bandwidth > 0:
        raise ValueError(f"recipe {name}: bandwidth must be above 0, got {config.bandwidth}.")
    if recipe.coefficient and config.target_l0 and not getattr(config, recipe.coefficient) > 0:
        raise ValueError(f"recipe {name}: the search for λ starts from {recipe.coefficient}, which must be above 0.")
    return recipe, config


def _with_k_of_target(recipe: Recipe, config: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    if config.target_l0 != int(config.target_l0):
        raise ValueError(f"recipe {recipe.name}: its L0 is k, a whole number; got target_l0 = {config.target_l0:g}.")
    if overrides.get("k") not in (None, config.target_l0):
        raise ValueError(f"recipe {recipe.name}: k = {config.k} and target_l0 = {config.target_l0:g}. Give one.")
    return with_overrides(config, {"k": int(config.target_l0)})


def _refuse_useless_settings(recipe: Recipe, config: TrainConfig) -> None:
    reasons = {
        "k": f"has no k (its sparsity comes from {recipe.coefficient})",
        "l1": "has no L1 penalty" + ("" if recipe.coefficient else " (its sparsity is k)"),
    }
    for setting in fields(TrainConfig):
        given = getattr(config, setting.name)
        if setting.name in OPTIONAL and setting.name not in recipe.settings and given != setting.default:
            reason = reasons.get(setting.name, f"has no use for {setting.name}")
            raise ValueError(f"recipe {recipe.name} {reason}; got {setting.name} = {given}.")
