"""The sparsity penalty's coefficient λ over a run: warmed up, annealed, or searched for so that L0 meets a target."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sae.training.config import TrainConfig

MEAN_L0_STEPS = 10  # L0 is averaged over about this many steps before it is compared
SEARCH_SHARES = (0.1, 0.95)  # of the run, in which λ is searched; before it λ rises, so that features find inputs
GAIN, LARGEST_GAIN = 40.0, 0.1  # e-folds of λ over a run in which L0 is off by a factor of e; at most, in one step
LEAD_STEPS = 40  # the search uses the L0 expected after this many steps: silenced features rarely fire again
RESPONSE = 0.5  # λ also responds to L0 at once, with this exponent; it damps the search: L0 follows λ with a delay
LARGEST_RATIO = 2.0  # a larger deviation of L0 from the target, up or down, counts as this factor
MET_WITHIN = 1.2  # the factor by which L0 may miss the target without a warning
USUAL_L0 = 15.0  # about the L0 that a recipe's own λ gives; L0 is roughly proportional to 1/λ


class LambdaController:
    """λ of a running training, step by step: `coefficient · response · annealing`, rising linearly at first.

    With a `target_l0` it is a proportional and integral controller:
    `log λ = ∫ gain · off + RESPONSE · off`, `off = log(mean L0 / target) + LEAD_STEPS · d log(mean L0) / d step`,
    bounded either way. Before the search starts, λ does not rise faster than its warm-up, but may fall.
    """

    def __init__(
        self,
        config: TrainConfig,
        coefficient: float,
        *,
        step: int = 0,
        mean_l0: float = 0.0,
        response: float = 1.0,
        annealing: float = 1.0,
    ) -> None:
        self.config, self.step = config, step
        self.coefficient, self.mean_l0 = coefficient, mean_l0
        self.response = response  # to the present L0; 1 where there is no search
        self.annealing = annealing  # keeps λ Σ f^p the same while p falls

    @classmethod
    def start(cls, config: TrainConfig, coefficient: float) -> LambdaController:
        """λ as given; with a target L0, the λ that is likely to give it: the search starts there."""
        return cls(config, coefficient * USUAL_L0 / config.target_l0 if config.target_l0 else coefficient)

    @property
    def searches(self) -> bool:
        """Whether λ is searched for: a target L0, and a penalty that can meet it."""
        return self.config.target_l0 > 0 and self.coefficient > 0

    @property
    def value(self) -> float:
        """λ of the present step."""
        return self.coefficient * self.response * self.annealing * self.warmup(self.step)

    @property
    def p(self) -> float:
        """The exponent of Σ f^p at the present step."""
        return exponent_at(self.step, self.config)

    @property
    def next_p(self) -> float:
        return exponent_at(self.step + 1, self.config)

    def update(self, l0: float) -> None:
        """Takes the L0 of a step, moves λ towards the value that gives the target L0, and advances to the next step."""
        if self.searches:
            self._search(l0)
        self.step += 1

    def keep_penalty(self, before: float, after: float) -> None:
        """Rescales λ where the penalty on the same activations goes from `before` to `after` with the next p.

        Source: Karvonen et al. 2024 (arXiv 2408.00113), who do so over ten batches at each of a few changes of p.
        """
        if after > 0:
            self.annealing *= before / after

    def saved(self) -> dict[str, float]:
        """What a checkpoint holds: the arguments of the constructor besides `config` and `step`."""
        return {name: getattr(self, name) for name in ("coefficient", "mean_l0", "response", "annealing")}

    def move_to(self, step: int, numbers: Sequence[float]) -> None:
        """Takes over what steps on a device have made of the numbers of `saved`."""
        self.step = step
        for name, number in zip(self.saved(), numbers, strict=True):
            setattr(self, name, number)

    def missed_target(self) -> str:
        """A warning if a finished run has missed its target L0; empty if it met the target or has none."""
        if not self.searches or 1 / MET_WITHIN <= self.mean_l0 / self.config.target_l0 <= MET_WITHIN:
            return ""
        return (
            f"recipe {self.config.recipe}: L0 {self.config.target_l0:g} was asked for; the search for λ ended at "
            f"{self.mean_l0:.3g} in {self.config.steps:,} steps. Train for more steps (--tokens, or a smaller "
            "--batch-tokens) to get closer."
        )

    def _search(self, l0: float) -> None:
        _, start, stop, gain = search_constants(self.config)
        off = self._off_target(l0)
        if self.step < start and off < 0:  # undo the warm-up's next rise, because L0 is about to fall below the target
            self.coefficient *= self.warmup(self.step) / self.warmup(self.step + 1)
        if self.step < stop and (self.step >= start or off < 0):
            self.response = math.exp(RESPONSE * off)
            self.coefficient *= math.exp(gain * off)
        else:
            self.response = 1.0

    def _off_target(self, l0: float) -> float:
        """How far L0 will be from the target, as a bounded logarithm; the running mean takes in `l0`."""
        before = self.mean_l0 if self.step else l0
        self.mean_l0 += (l0 - self.mean_l0) / min(MEAN_L0_STEPS, self.step + 1)
        now, then = (math.log(max(mean, 1e-9)) for mean in (self.mean_l0, before))
        bound = math.log(LARGEST_RATIO)
        return min(bound, max(-bound, now - math.log(self.config.target_l0) + LEAD_STEPS * (now - then)))

    def warmup(self, step: int) -> float:
        """The share of λ that a step has reached."""
        share = max(self.config.penalty_warmup_share, SEARCH_SHARES[0] if self.config.target_l0 else 0.0)
        return min(1.0, (step + 1) / (share * self.config.steps)) if share else 1.0


def search_constants(config: TrainConfig) -> tuple[float, float, float, float]:
    """The logarithm of the target L0, the steps between which λ is searched for, and the gain of a step."""
    start, stop = (share * config.steps for share in SEARCH_SHARES)
    return math.log(config.target_l0), start, stop, min(GAIN / config.steps, LARGEST_GAIN)


def exponent_at(step: int, config: TrainConfig) -> float:
    """p of Σ f^p: 1 until `p_from_share` of the run, then falling linearly to `p_end` at the last step."""
    start = config.p_from_share * config.steps
    share = (step - start) / max(1.0, config.steps - 1 - start)
    return 1.0 - (1.0 - config.p_end) * min(1.0, max(0.0, share))
