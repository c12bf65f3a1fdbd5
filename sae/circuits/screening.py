"""Patching all neurons or all features at once, to first order; the largest are then worth exact patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.circuits.intervals import ratio_of_means
from sae.circuits.patching import MEANING, RANDOM, Direction, Runs, gradients
from sae.circuits.results import Control, Measure
from sae.dictionary.autoencoder import SAE, refuse_row_scale, refuse_transcoder


class Effects(NamedTuple):
    """What patching each unit adds to LD, to first order, and the same along random directions of equal norm."""

    units: Float[Tensor, "prompt unit"]
    random: Float[Tensor, "prompt unit"]


@torch.no_grad()
def unit_effects(
    runs: Runs, hook_point: str, direction: Direction, *, sae: SAE | None = None, seed: int = 0
) -> Effects:
    """Neuron i: Σ (x_source − x)_i · (∂LD/∂x)_i. Feature i of `sae`: Σ (a_source − a)_i · W_dec_i · ∂LD/∂x.

    Sums over positions. Raises: ValueError for a transcoder or a dictionary that normalises rows.
    """
    own, source = runs.own(direction)[hook_point], runs.source(direction)[hook_point]
    gradient = gradients(runs, direction, [hook_point])[hook_point]
    generator = torch.Generator().manual_seed(seed)
    if sae is None:
        change, slope, norms = source - own, gradient, torch.ones(own.shape[-1])
    else:
        refuse_transcoder(sae, "patching")
        refuse_row_scale(sae, "patching")
        change, slope, norms = sae.encode(source) - sae.encode(own), gradient @ sae.W_dec.T, sae.W_dec.norm(dim=-1)
    noise = torch.randn(len(norms), own.shape[-1], generator=generator)
    blind = gradient @ (noise / noise.norm(dim=-1, keepdim=True) * norms.cpu()[:, None]).T.to(gradient)
    return Effects((change * slope).sum(1).cpu(), (change * blind).sum(1).cpu())


def unit_gradients(
    runs: Runs, hook_point: str, direction: Direction, *, sae: SAE | None = None, seed: int = 0
) -> Measure:
    """What patching each neuron, or each feature of `sae`, adds to first order, at all positions.

    Control: for each unit a random direction of equal norm.
    """
    effects = unit_effects(runs, hook_point, direction, sae=sae, seed=seed)
    spread = runs.ld_clean - runs.ld_corrupt
    value, interval = ratio_of_means(effects.units, spread)
    control, control_interval = ratio_of_means(effects.random, spread)
    return Measure(
        value,
        len(runs.task),
        "prompts",
        "Σ (a_source − a) · direction · ∂LD/∂x / (LD − LD_c), means over prompts: what patching adds, to first order; "
        f"{MEANING[direction]}",
        {"random_direction": Control(control, RANDOM, control_interval)},
        interval,
        ("neuron" if sae is None else "feature",),
    )


def largest(measure: Measure, n: int) -> list[int]:
    """The units with the largest absolute values, largest first."""
    assert isinstance(measure.value, Tensor)
    order: Int[Tensor, " n"] = measure.value.abs().topk(min(n, len(measure.value))).indices
    return [int(i) for i in order]
