"""The sparsity penalty's coefficient λ over a run: warmed up, annealed, or found so that a wanted L0 is met."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sae.training.config import TrainConfig

MEAN_L0_STEPS = 10  # L0 is averaged over about this many steps before it is compared
SEARCH_SHARES = (0.1, 0.95)  # of the run, in which λ is searched; before it rises, so that features find inputs
GAIN, LARGEST_GAIN = 40.0, 0.1  # e-folds of λ over a run in which L0 is off by a factor of e; in a step at most
LEAD_STEPS = 40  # L0 is judged by where it will be: what λ has silenced by then seldom comes back
RESPONSE = 0.5  # λ answers at once to L0 by this power, which damps the search: L0 follows λ with a delay
LARGEST_RATIO = 2.0  # what L0 is off by counts as no more than this, either way
MET_WITHIN = 1.2  # the factor by which an L0 may miss what was asked for without a word
USUAL_L0 = 15.0  # about what a recipe's own λ leads to; L0 goes about as 1/λ


@dataclass
class Penalty:
    """λ of a running training and what its search needs to remember; in the checkpoint."""

    coefficient: float
    mean_l0: float = 0.0
    response: float = 1.0  # to how far L0 is off at the moment; 1 where nothing is searched
    annealing: float = 1.0  # keeps λ Σ f^p the same while p falls


def at_start(coefficient: float, config: TrainConfig) -> Penalty:
    """λ as given; where an L0 is wanted, the search starts from the λ that may lead there."""
    return Penalty(coefficient * USUAL_L0 / config.target_l0 if config.target_l0 else coefficient)


def coefficient_at(penalty: Penalty, step: int, config: TrainConfig) -> float:
    """λ of a step: `coefficient · response · annealing`, rising linearly over the warm-up."""
    return penalty.coefficient * penalty.response * penalty.annealing * _rise(step, config)


def _rise(step: int, config: TrainConfig) -> float:
    """The share of λ that a step has reached."""
    share = max(config.penalty_warmup_share, SEARCH_SHARES[0] if config.target_l0 else 0.0)
    return min(1.0, (step + 1) / (share * config.steps)) if share else 1.0


def p_at(step: int, config: TrainConfig) -> float:
    """The exponent of Σ f^p: 1, then falling linearly to `p_end` at the last step."""
    start = config.p_from_share * config.steps
    share = (step - start) / max(1.0, config.steps - 1 - start)
    return 1.0 - (1.0 - config.p_end) * min(1.0, max(0.0, share))


def search_(penalty: Penalty, l0: float, step: int, config: TrainConfig) -> None:
    """Moves λ after a step towards the one at which L0 is `target_l0`: a proportional and integral controller.

    `log λ = ∫ gain · off + response · off`, `off = log(mean L0 / target) + LEAD_STEPS · d log(mean L0) / d step`,
    bounded either way. Before the search λ does not rise while L0 is on its way below the target, but may fall.
    """
    if not config.target_l0:
        return
    start, stop = (share * config.steps for share in SEARCH_SHARES)
    before = penalty.mean_l0 if step else l0
    penalty.mean_l0 += (l0 - penalty.mean_l0) / min(MEAN_L0_STEPS, step + 1)
    now, then = (math.log(max(mean, 1e-9)) for mean in (penalty.mean_l0, before))
    bound = math.log(LARGEST_RATIO)
    off = min(bound, max(-bound, now - math.log(config.target_l0) + LEAD_STEPS * (now - then)))
    if step < start and off < 0:
        penalty.coefficient *= _rise(step, config) / _rise(step + 1, config)
    if step < stop and (step >= start or off < 0):
        penalty.response = math.exp(RESPONSE * off)
        penalty.coefficient *= math.exp(min(GAIN / config.steps, LARGEST_GAIN) * off)
    else:
        penalty.response = 1.0


def missed(penalty: Penalty, config: TrainConfig) -> str:
    """What to say of a finished run whose L0 is not what was asked for; nothing where it is, or where none was."""
    if not config.target_l0 or 1 / MET_WITHIN <= penalty.mean_l0 / config.target_l0 <= MET_WITHIN:
        return ""
    return (
        f"recipe {config.recipe}: L0 {config.target_l0:g} was asked for; the search for λ ended at "
        f"{penalty.mean_l0:.3g} in {config.steps:,} steps. More steps (--tokens, or a smaller --batch-tokens) bring it "
        "nearer."
    )
