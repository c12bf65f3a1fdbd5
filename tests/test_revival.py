"""Silent JumpReLU features: the rule by hand, and features that come back because of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_thresholds import Weak

from sae.training import loop
from sae.training.batch_topk_threshold import PATIENCE
from sae.training.recipes import resolve
from sae.training.revival import SILENT_FOR, raise_silent_biases_
from sae.training.state import TrainState


def test_only_features_silent_for_long_rise_and_by_how_much() -> None:
    min_density, rows = 0.01, 50
    since = torch.tensor([0, 399, 400, 10**6])
    b_enc, threshold = torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.tensor([2.0, 2.0, 2.0, 0.5])
    raise_silent_biases_(b_enc, threshold, since, rows, min_density)
    assert SILENT_FOR / min_density == 400
    assert b_enc[:2].tolist() == [-1.0, -1.0]
    assert b_enc[2].item() == pytest.approx(-1 + 2.0 * 0.01 * 50 / PATIENCE)
    mean = 6.5 / 4  # higher than the last feature's own threshold
    assert b_enc[3].item() == pytest.approx(-1 + mean * 0.01 * 50 / PATIENCE)


@pytest.mark.parametrize("min_density", [0.0, 0.01])
def test_silent_features_come_back_only_with_a_min_density(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_density: float
) -> None:
    rows, start = Weak(), loop.start

    def start_half_silent(*args: object) -> TrainState:
        state = start(*args)  # type: ignore[arg-type]
        with torch.no_grad():
            state.sae.b_enc[12:] = -8.0
        return state

    monkeypatch.setattr(loop, "start", start_half_silent)
    _, config = resolve(
        "jumprelu", d_sae=24, l0_penalty=0.5, tokens=128 * 400, batch_tokens=128, min_density=min_density
    )
    density = (loop.train(rows, tmp_path, config).encode(rows.draw(20_000, 7)) > 0).double().mean(0)
    assert (density[12:] > 0).sum() == 0 if not min_density else (density[12:] > min_density / 3).sum() >= 10
