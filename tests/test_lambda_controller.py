"""The search for λ on simulated plants: L0 as a closed form of λ, which it follows with a delay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from sae.training.config import TrainConfig
from sae.training.sparsity_penalty import MET_WITHIN, SEARCH_SHARES, LambdaController

STEPS = 2000


def config(**settings: float) -> TrainConfig:
    return TrainConfig(recipe="towards-monosemanticity", tokens=STEPS, batch_tokens=1, **settings)  # type: ignore[arg-type]


@dataclass
class Plant:
    """`log L0` moves towards `log(scale / λ^power)`, by a share of the way per step: one falling, another rising."""

    scale: float = 20.0
    power: float = 1.0
    falling: float = 0.05
    rising: float = 0.05
    l0: float = 200.0

    def step(self, coefficient: float) -> float:
        settled = math.log(self.scale / max(coefficient, 1e-6) ** self.power)
        way = min(settled, math.log(2000)) - math.log(self.l0)
        self.l0 *= math.exp(way * (self.falling if way < 0 else self.rising))
        return self.l0


def run(plant: Plant, controller: LambdaController, steps: int = STEPS) -> list[float]:
    """L0 after every step."""
    found = []
    for _ in range(steps):
        found.append(plant.step(controller.value))
        controller.update(found[-1])
    return found


@pytest.mark.parametrize("target", [1.0, 5.0, 60.0])
@pytest.mark.parametrize("guess", [1 / 30, 1.0, 30.0], ids="from λ times {:.2g}".format)
@pytest.mark.parametrize(
    "plant",
    [{}, {"power": 0.5}, {"power": 1.5}, {"falling": 0.2, "rising": 0.2}, {"falling": 0.05, "rising": 0.01}],
    ids=str,
)
def test_l0_meets_the_target_from_any_start(plant: dict[str, float], guess: float, target: float) -> None:
    """Weak and strong responses, quick and slow ones, and one that comes back five times slower than it goes."""
    controller = LambdaController.start(config(target_l0=target), guess)
    l0 = run(Plant(**plant), controller)
    assert 1 / MET_WITHIN < l0[-1] / target < MET_WITHIN
    assert not controller.missed_target()
    assert controller.mean_l0 == pytest.approx(l0[-1], rel=0.05)


def test_l0_does_not_fall_far_below_its_target_on_the_way() -> None:
    """Features silenced by a λ too large seldom fire again."""
    l0 = run(Plant(), LambdaController.start(config(target_l0=5.0), 30.0))
    assert min(l0) > 5.0 / 2


def test_a_plant_that_does_not_respond_is_reported() -> None:
    controller = LambdaController.start(config(target_l0=5.0), 1.0)
    run(Plant(power=0.0), controller)
    assert "L0 5 was asked for; the search for λ ended at 20 in 2,000 steps" in controller.missed_target()


def test_lambda_rests_after_the_search() -> None:
    controller, plant = LambdaController.start(config(target_l0=5.0), 1.0), Plant()
    run(plant, controller, math.ceil(SEARCH_SHARES[1] * STEPS) + 1)
    resting = controller.value
    plant.l0 *= 10
    run(plant, controller, 50)
    assert controller.value == resting


def test_without_a_target_lambda_is_as_given_after_its_warm_up() -> None:
    controller = LambdaController.start(config(l1=3.0, penalty_warmup_share=0.1), 3.0)
    values = []
    for _ in range(STEPS):
        values.append(controller.value)
        controller.update(100.0)
    assert values[:200] == pytest.approx([3.0 * (step + 1) / 200 for step in range(200)])
    assert set(values[200:]) == {3.0}
    assert not controller.missed_target()


@pytest.mark.parametrize("stop", [1, 50, 700, 1950])
def test_it_continues_from_what_a_checkpoint_holds(stop: int) -> None:
    whole, plant = LambdaController.start(config(target_l0=5.0), 10.0), Plant()
    run(plant, whole, stop)
    assert set(whole.saved()) == {"coefficient", "mean_l0", "response", "annealing"}
    resumed, twin = LambdaController(whole.config, step=whole.step, **whole.saved()), Plant(l0=plant.l0)
    assert run(plant, whole, STEPS - stop) == run(twin, resumed, STEPS - stop)
    assert whole.saved() == resumed.saved()
