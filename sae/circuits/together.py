"""Neurons or features patched together: how many of a layer's units it takes to carry the answer of a task."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.circuits.patching import FORMULA, MEANING, Direction, Runs, activation_patching, share
from sae.circuits.results import Control, Measure
from sae.circuits.screening import unit_effects
from sae.circuits.sites import Several, Site, patched
from sae.dictionary.autoencoder import SAE

RANDOM_ORDERS = 4
UNITS_AT_RANDOM = f"as many units, drawn at random (mean of {RANDOM_ORDERS} draws)"
OTHER_PROMPTS = "as many units, those with the largest effects on the other half of the prompts"
WHOLE = "everything at the hook point, also what no unit accounts for"


@torch.no_grad()
def together(
    runs: Runs, hook_point: str, direction: Direction, *, sae: SAE | None = None, seed: int = 0
) -> tuple[Measure, list[int]]:
    """The share of the 1, 2, 4, … units with the largest first-order effects, patched together; and these sizes.

    The last size is all units: of a dictionary, what it reconstructs. Controls: a random direction with the norm of the
    patch; units at random; units that were chosen on other prompts, because a choice looks best on its own prompts; the
    identity; and the patch of the whole hook point.
    """
    effects = unit_effects(runs, hook_point, direction, sae=sae, seed=seed).units
    n, units = effects.shape
    sizes = [*(2**i for i in range((units - 1).bit_length())), units]
    even = (torch.arange(n) % 2 == 0)[:, None]
    on_other_prompts = torch.where(even, _rank(effects[1::2]), _rank(effects[::2]))
    generator = torch.Generator().manual_seed(seed)
    at_random = [torch.randperm(units, generator=generator)[None] for _ in range(RANDOM_ORDERS)]

    def sites(rank: Int[Tensor, "#prompt unit"]) -> list[Site]:
        return [Several(f"{k}", hook_point, chosen=rank.expand(n, -1) < k, sae=sae) for k in sizes]

    def lds(patches: list[Site]) -> Float[Tensor, "prompt size"]:
        source = runs.source(direction)[hook_point]
        return torch.stack([runs.ld(direction, {hook_point: patched(site, source)}) for site in patches], 1)

    largest = activation_patching(runs, sites(_rank(effects)), [None], direction, seed=seed)
    random = share(runs, torch.stack([lds(sites(rank)) for rank in at_random]).mean(0))
    chosen_elsewhere = share(runs, lds(sites(on_other_prompts)))
    whole = share(runs, lds([Site("all", hook_point)]).expand(-1, len(sizes)))
    controls = {name: Control(_first(each.value), each.what, _ends(each)) for name, each in largest.controls.items()}
    controls |= {
        "random_units": Control(random[0], UNITS_AT_RANDOM, random[1]),
        "chosen_on_other_prompts": Control(chosen_elsewhere[0], OTHER_PROMPTS, chosen_elsewhere[1]),
        "whole_hook_point": Control(whole[0], WHOLE, whole[1]),
    }
    formula = f"{FORMULA}; so many units together, largest first-order effects first; {MEANING[direction]}"
    return Measure(_first(largest.value), n, "prompts", formula, controls, _ends(largest), ("units",)), sizes


def _rank(effects: Float[Tensor, "prompt unit"]) -> Int[Tensor, "1 unit"]:
    """0 for the unit whose mean effect is largest in absolute value."""
    return effects.mean(0).abs().argsort(descending=True).argsort()[None]


def _first(value: float | Tensor) -> Tensor:
    """The only place, at all positions, of a grid by site and place."""
    assert isinstance(value, Tensor)
    return value[:, 0]


def _ends(found: Measure | Control) -> tuple[Tensor, Tensor] | None:
    return None if found.ci95 is None else (_first(found.ci95[0]), _first(found.ci95[1]))
