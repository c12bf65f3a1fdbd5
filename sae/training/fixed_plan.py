"""Whether a run takes fixed-shape steps (`sae.kernels.triton_step`), in which sizes, and at which steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sae.dictionary.autoencoder import SAE
from sae.dictionary.sites import Site
from sae.kernels.triton_step.buffers import LARGEST_ROOM, Sizes, first_room, power_of_two
from sae.training import objectives
from sae.training.config import TrainConfig
from sae.training.recipes import Recipe

SWITCH = "SAE_FIXED_STEP"  # 0 in the environment: new runs take general steps only
LONGEST_WAIT, FORGET_AFTER = 1024, 1024  # in steps


@dataclass
class FixedPlan:
    """What decides the steps that are fixed; a checkpoint holds it, so that a resumed run takes the same ones.

    A step that halts is taken by the general path, and so are the next `wait` − 1 ones. Each halt within FORGET_AFTER
    steps of the last one doubles `wait`, so that a run whose steps do not fit loses little.
    """

    room: int  # candidates of a row; 0 until the first step that is sparse enough
    wait: int = 1
    last_halt: int = -FORGET_AFTER
    resume_at: int = 0  # the next step that may be fixed
    dead_room: int = 0  # dead features for AuxK; 0 until the first one

    def halted(self, step: int, sizes: Sizes, *, overrun: bool) -> None:
        """Takes note that this step could not be done in fixed shapes."""
        self.wait = min(2 * self.wait, LONGEST_WAIT) if step - self.last_halt < FORGET_AFTER else 1
        self.last_halt, self.resume_at = step, step + self.wait
        if overrun:
            self.room = sizes.with_more_room().room

    def saved(self) -> dict[str, Any]:
        return asdict(self)


def plan_for(recipe: Recipe, config: TrainConfig, device: torch.device, kernels: str) -> FixedPlan | None:
    """The plan of a new run; None if all of its steps are general: on a CPU, and for what fixed shapes cannot do."""
    if not runs_on(device) or kernels != "triton" or os.environ.get(SWITCH) == "0" or not can_be_fixed(recipe, config):
        return None
    return FixedPlan(first_room(config.k, config.d_sae, of_batch=recipe.activation == "batchtopk") if config.k else 0)


def runs_on(device: torch.device) -> bool:
    """Whether fixed-shape steps are meant for this device."""
    return device.type == "cuda"


# What λ multiplies, as the kernels name it
PENALTIES: dict[objectives.Objective, str] = {
    objectives.l1: "l1",
    objectives.l1_of_norms: "norms",
    objectives.l1_of_site_norms: "norms",
    objectives.end_to_end: "l1",
    objectives.annealed_lp: "powers",
    objectives.jumprelu: "jumps",
    objectives.gated: "gates",
}


def can_be_fixed(recipe: Recipe, config: TrainConfig) -> bool:
    """Whether the recipe's step, with these settings, has been written in fixed shapes."""
    if recipe.objective in PENALTIES:
        return True
    selects = recipe.objective in (objectives.topk, objectives.matryoshka)
    return selects and not config.multi_k and 2 * config.k <= LARGEST_ROOM


def room_for(l0: float) -> int:
    """Room for a row's candidates where rows differ: four times the mean number of them; 0 if that is too much."""
    room = max(32, power_of_two(4 * round(l0)))
    return room if room <= LARGEST_ROOM else 0


def sizes_of(plan: FixedPlan, recipe: Recipe, config: TrainConfig, sae: SAE, sites: Sequence[Site]) -> Sizes:
    """The sizes of the run's fixed steps."""
    return Sizes(
        config.batch_tokens,
        sae.d_in,
        config.d_sae,
        config.k,
        plan.room,
        of_batch=recipe.activation == "batchtopk",
        penalty=PENALTIES.get(recipe.objective, ""),
        prefix_ends=config.prefix_sizes,
        dead_room=plan.dead_room,
        exact=config.precision == "float32",
        target_width=sae.d_out if recipe.needs == "y" else 0,
        skip=sae.skip,
        elsewhere=recipe.needs == "resid",
        site_widths=tuple(site.width for site in sites),
    )
