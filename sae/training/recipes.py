"""Named training recipes: each combines an activation, a loss, constraints and a cure for dead features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from sae.training import objectives
from sae.training.config import DEFAULTS, RECIPE_SPECIFIC, TrainConfig, with_overrides
from sae.training.initialise import Initialise, from_data_, kaiming_, tied_
from sae.training.resample import Resample, resample_, reseed_


@dataclass(frozen=True)
class Recipe:
    """What distinguishes a recipe: its dictionary, loss, start and cure for dead features, and its settings."""

    name: str
    summary: str
    loss: str
    when: str
    source: str
    activation: str
    objective: objectives.Objective
    initialise: Initialise
    resample: Resample | None = None  # gives dead features new weights
    coefficient: str = ""  # the setting that holds λ; "": sparsity is k
    unit_norm: bool = True  # of decoder rows
    pre_bias: bool = True
    balance_share: float = 0.0  # default min_density, as a share of the mean density that was asked for: L0 / d_sae
    # Of the rows besides x: "y" (the target), "resid" (for the rest of the model) or "sites" (the parts of x).
    needs: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)  # the recipe-specific settings it has, and other defaults

    @property
    def penalised(self) -> str:
        """What λ multiplies, as config.json names it."""
        if self.needs == "resid":
            return "λ · Σ f beside KL"
        if self.needs == "sites":
            return "λ · Σ f Σ ‖d^s‖"
        return {"l1": "λ · Σ f", "l0_penalty": "λ · L0", "": "none: sparsity is k"}[self.coefficient]

    @property
    def settings(self) -> set[str]:
        """The recipe-specific settings it has a use for."""
        return set(self.defaults) & RECIPE_SPECIFIC


DEFAULT_RECIPE = "matryoshka"
BRICKEN = "Bricken et al. 2023, appendix"
L1_RESAMPLED = {"l1": 10.0, "decay_share": 0.0, "resample_shares": (0.1, 0.2, 0.3, 0.4)}
BALANCE = 0.04
K_WITH_AUX = {"k": 20, "aux_coefficient": 1 / 32, "decay_share": 0.8}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="towards-monosemanticity",
            summary="ReLU + L1, tied pre-bias from the geometric median, unit-norm decoder, loss²-weighted resampling",
            loss="‖x − x̂‖² + λ Σ f",
            when="to reproduce the paper; L1 shrinks the activations",
            source=BRICKEN,
            activation="relu",
            objective=objectives.l1,
            initialise=kaiming_,
            resample=resample_,
            coefficient="l1",
            defaults={**L1_RESAMPLED, "exact": False},
        ),
        Recipe(
            name="anthropic-2024-04",
            summary="ReLU + L1 weighted by free decoder norms, λ warm-up, clipped gradients, no resampling",
            loss="‖x − x̂‖² + λ Σ f ‖d‖",
            when="L1 without unit norms or resampling: the baseline of most later papers",
            source="Anthropic, Circuits Updates April 2024; Templeton et al. 2024",
            activation="relu",
            objective=objectives.l1_of_norms,
            initialise=tied_,
            coefficient="l1",
            unit_norm=False,
            pre_bias=False,
            defaults={"l1": 5.0, "decay_share": 0.2, "penalty_warmup_share": 0.05, "clip": 1.0},
        ),
        Recipe(
            name="gated",
            summary="a gate chooses features, magnitudes are free of the penalty (shared weights); resampling",
            loss="‖x − x̂‖² + λ Σ ReLU(π) + ‖x − x̂_frozen(ReLU(π))‖²",
            when="L1 without shrinkage",
            source="Rajamanoharan et al. 2024 (arXiv 2404.16014)",
            activation="gated",
            objective=objectives.gated,
            initialise=kaiming_,
            resample=resample_,
            coefficient="l1",
            defaults={**L1_RESAMPLED, "exact": False, "beta1": 0.0, "rewarm_share": 0.02},
        ),
        Recipe(
            name="jumprelu",
            summary="a learned threshold per feature and a penalty on L0 itself, by straight-through gradients",
            loss="‖x − x̂‖² + λ L0",
            when="the number of active features may vary from token to token; thresholds learn 16 times faster than "
            "the rest, so that a short run can reach a low L0",
            source="Rajamanoharan et al. 2024 (arXiv 2407.14435)",
            activation="jumprelu",
            objective=objectives.jumprelu,
            initialise=from_data_,
            coefficient="l0_penalty",
            pre_bias=False,
            balance_share=BALANCE,
            defaults={
                "l0_penalty": 2.0,
                "bandwidth": 0.1,
                "threshold_init": 0.1,
                # Adam moves a threshold by its learning rate, however large λ is. An L0 of 2 needs thresholds of
                # about 10, which a short run cannot reach at lr itself: a search would raise λ without effect.
                "threshold_lr_ratio": 16.0,
                "min_density": 0.0,
                "beta1": 0.0,
                "penalty_warmup_share": 0.1,
            },
        ),
        Recipe(
            name="topk",
            summary="ReLU of the k largest, initialised from the data; AuxK (1/32) and reseeding for dead features",
            loss="‖x − x̂‖² + AuxK (+ L(multi_k · k) / 8)",
            when="exactly k features for every token, like TopK in other tools",
            source="Gao et al. 2024 (arXiv 2406.04093)",
            activation="topk",
            objective=objectives.topk,
            initialise=from_data_,
            # With AuxK alone, dead features never return once the error is small: what they learn from it does not rank
            # among the k largest. Reseeded to rank in the middle of the k on a badly reconstructed input, they stay.
            resample=reseed_,
            defaults={**K_WITH_AUX, "multi_k": 0, "resample_shares": (0.4, 0.55, 0.7, 0.8, 0.9)},
        ),
        Recipe(
            name="batch-topk",
            summary="ReLU of the k · rows largest of the batch, a threshold for inference calibrated at the end; AuxK",
            loss="‖x − x̂‖² + AuxK",
            when="k features per token on average, more where a token needs more",
            source="Bussmann et al. 2024 (arXiv 2412.06410)",
            activation="batchtopk",
            objective=objectives.topk,
            initialise=from_data_,
            # No reseeding: badly reconstructed rows are often outliers, and features reseeded there can take all the
            # k · rows places of a batch. Measured on a corpus, k = 2: FVU was 0.27 before an event with nine features
            # in ten dead, and 22 after it.
            defaults={**K_WITH_AUX, "min_density": 0.0, "calibrate_threshold": True},
        ),
        Recipe(
            name="balanced",
            summary="batch-topk that keeps every feature alive: rarely firing features get a ranking bonus",
            loss="‖x − x̂‖²",
            when="k features per token on average, almost no dead features, and nothing else asked of them",
            source="Bussmann et al. 2024 (arXiv 2412.06410); the balance from Wang et al. 2024 (arXiv 2408.15664)",
            activation="batchtopk",
            objective=objectives.topk,
            initialise=from_data_,
            # The fit depends on lr · steps. Measured on a corpus, 4M rows, batches of 2,048 and of 512: at k = 5, FVU
            # 0.081 and 0.051; at k = 20, 0.0035 and 0.0003. But with so close a fit few features do the work and the
            # bonus keeps the others alive: half as many features belong to one domain or match a rule.
            balance_share=BALANCE,
            defaults={
                "k": 20,
                "min_density": 0.0,
                "calibrate_threshold": True,
                "batch_tokens": 2048,
                "decay_share": 0.8,
            },
        ),
        Recipe(
            name="matryoshka",
            summary="batch-topk whose first features must reconstruct alone, at five sizes; no feature falls silent",
            loss="Σ over prefixes m of ‖x − x̂_{1…m}‖² + AuxK",
            when="the default, and the first to try: where the true features are known, its are nearest to them; "
            "general features stay whole next to their special cases (less absorption)",
            source="Bussmann et al. 2025 (arXiv 2503.17547)",
            activation="batchtopk",
            objective=objectives.matryoshka,
            initialise=from_data_,
            balance_share=BALANCE,
            defaults={
                **K_WITH_AUX,
                "lr": 2e-3,
                "batch_tokens": 1024,
                "min_density": 0.0,
                "calibrate_threshold": True,
                "prefix_shares": (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0),
            },
        ),
        Recipe(
            name="p-anneal",
            summary="ReLU with an Lp penalty whose p falls from 1 towards 0, λ rescaled to match; resampling",
            loss="‖x − x̂‖² + λ Σ f^p, p: 1 → 0.2",
            when="features like L1's, with less shrinkage",
            source="Karvonen et al. 2024 (arXiv 2408.00113)",
            activation="relu",
            objective=objectives.annealed_lp,
            initialise=kaiming_,
            resample=resample_,
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
            initialise=kaiming_,
            coefficient="l1",
            pre_bias=False,
            needs="y",
            defaults={"l1": 5.0, "skip": False, "penalty_warmup_share": 0.05},
        ),
        Recipe(
            name="crosscoder",
            summary="ReLU + L1 on several layers or models at once: one set of features, a decoder for each site",
            loss="Σ_s ‖x^s − x̂^s‖² + λ Σ f Σ_s ‖d^s‖",
            when="to see which features layers or models share, and which only one of them has",
            source="Lindsey et al. 2024, Sparse Crosscoders for Cross-Layer Features and Model Diffing",
            activation="relu",
            objective=objectives.l1_of_site_norms,
            initialise=tied_,
            coefficient="l1",
            unit_norm=False,
            pre_bias=False,
            needs="sites",
            defaults={"l1": 5.0, "decay_share": 0.2, "penalty_warmup_share": 0.05, "clip": 1.0, "shuffle_sites": False},
        ),
        Recipe(
            name="end-to-end",
            summary="ReLU + L1 with fidelity measured on the model's own next-token distribution",
            loss="KL(p(x) ‖ p(x̂)) + λ Σ f",
            when="to keep only what the model uses",
            source="Braun et al. 2024 (arXiv 2405.12241)",
            activation="relu",
            objective=objectives.end_to_end,
            initialise=kaiming_,
            resample=resample_,
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
    that the recipe has no use for.
    """
    recipe = recipe_named(name)
    config = with_overrides(TrainConfig(recipe=name, **recipe.defaults), overrides)
    if config.recipe != name:
        raise ValueError(f"the recipe is {name}, but the settings say recipe = {config.recipe!r}. Name one of them.")
    if "k" in recipe.settings and config.target_l0:
        config = _with_k_of_target(recipe, config, overrides)
    if recipe.balance_share and overrides.get("min_density") is None:
        l0 = config.k or config.target_l0
        config = with_overrides(config, {"min_density": recipe.balance_share * l0 / config.d_sae})
    _refuse_useless_settings(recipe, config)
    _check_settings(recipe, config)
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
    for name in sorted(RECIPE_SPECIFIC - recipe.settings):
        given = getattr(config, name)
        if given != DEFAULTS[name]:
            reason = reasons.get(name, f"has no use for {name}")
            raise ValueError(f"recipe {recipe.name} {reason}; got {name} = {given}.")


def _check_settings(recipe: Recipe, config: TrainConfig) -> None:
    """What a recipe asks of its settings beyond each one's own range."""
    if recipe.resample and config.exact and config.steps <= config.resample_steps[0]:
        raise ValueError(
            f"recipe {recipe.name}: exact=true resamples after {config.resample_steps[0]:,} steps, and this run has "
            f"{config.steps:,}. Give more tokens, or leave out exact to resample at shares of the run."
        )
    if "k" in recipe.settings and config.k < 1:
        raise ValueError(f"recipe {recipe.name}: k must be at least 1, got {config.k}.")
    if config.min_density * config.d_sae >= config.k > 0:
        raise ValueError(
            f"recipe {recipe.name}: {config.d_sae:,} features on min_density = {config.min_density:g} of the rows each "
            f"would fill k = {config.k}. Give a min_density well below k / d_sae = {config.k / config.d_sae:.1g}."
        )
    if "bandwidth" in recipe.settings and not config.bandwidth > 0:
        raise ValueError(f"recipe {recipe.name}: bandwidth must be above 0, got {config.bandwidth}.")
    if recipe.coefficient and config.target_l0 and not getattr(config, recipe.coefficient) > 0:
        raise ValueError(
            f"recipe {recipe.name}: the search for λ starts from {recipe.coefficient}, which must be above 0."
        )
