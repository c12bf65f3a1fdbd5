"""A training step asks a GPU for no more launches and no more synchronisations than the committed table says."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

import step_costs

RECORDED = json.loads(step_costs.TABLE.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter, which a GPU replaces")
@pytest.mark.parametrize("name", step_costs.CASES)
def test_a_step_costs_what_the_table_says(name: str) -> None:
    costs = step_costs.step_costs(*step_costs.CASES[name])
    found = {"launches": costs.launches.total(), "syncs": costs.syncs.total()}
    lines = "\n".join(f"{times:4} {line}" for line, times in (*costs.launches.most_common(), *costs.syncs.items()))
    assert found == RECORDED[name], (
        f"{name}: the table has {RECORDED[name]}. If the step became cheaper, or must cost more, run "
        f"`TRITON_INTERPRET=1 python tests/step_costs.py --write` and commit the table. Where they come from:\n{lines}"
    )


def test_every_case_is_in_the_table() -> None:
    assert set(RECORDED) == set(step_costs.CASES)


def test_launches_and_waits_of_known_code_are_counted() -> None:
    x, mask = torch.randn(4, 4), torch.tensor([True, False, True, True])

    def work() -> None:
        y = (x * 2).t().unsqueeze(0)  # one launch: the rest describes memory
        y.sum().item()  # a launch and a wait
        x[mask]  # a mask: five launches and a wait
        x[torch.tensor([0, 2])] = 0.0  # places, not a mask: one launch and no wait
        bool(mask.any())  # a launch and a wait

    costs = step_costs.costs_of(work)
    assert costs.syncs.total() == 3
    assert {what.split()[0] for what in costs.syncs} == {"item", "index", "__bool__"}
    assert costs.launches.total() == 1 + 1 + 5 + 1 + 1
