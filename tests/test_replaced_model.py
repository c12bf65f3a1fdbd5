"""A shipped model that a later version replaces: what was recorded with the earlier one still works with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import write_model

from sae import pipeline
from sae.lm import load as loading
from sae.lm import load_model

Ship = Callable[..., None]


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ship:
    """Ships models of these names, each with the weights of its seed, and none else."""

    def install(**seeds: int) -> None:
        models = {name: write_model(tmp_path / f"seed-{seed}", seed=seed) for name, seed in seeds.items()}
        monkeypatch.setattr(loading, "shipped_models", lambda: models)

    return install


def test_the_recorded_weights_choose_among_the_shipped_models(ship: Ship) -> None:
    ship(tiny=0)
    earlier = load_model("tiny").weights_sha256
    ship(tiny=1, tiny_earlier=0)
    assert load_model("tiny").weights_sha256 != earlier
    found = load_model("tiny", weights_sha256=earlier)
    assert (found.id, found.weights_sha256) == ("tiny_earlier", earlier)
    assert load_model("tiny", weights_sha256="5e" * 32).id == "tiny"  # nobody has these: the caller says what differs


def test_a_harvest_and_a_dictionary_of_the_earlier_model_go_on(ship: Ship, tiny_text: Path, tmp_path: Path) -> None:
    acts, run = tmp_path / "acts.zarr", tmp_path / "run"
    ship(tiny=0)
    pipeline.harvest("tiny", tiny_text, acts, tokens=2048, heldout_tokens=512)
    pipeline.train(acts, run, d_sae=64, tokens=1024, config={"batch_tokens": 256})
    before = pipeline.evaluate(run)["metrics"]["delta_ce"]["value"]
    ship(tiny=1, tiny_earlier=0)
    pipeline.harvest("tiny", tiny_text, acts, tokens=2048, heldout_tokens=512)
    assert pipeline.evaluate(run)["metrics"]["delta_ce"]["value"] == before
    ship(tiny=1)
    with pytest.raises(pipeline.PipelineError, match="has changed, or is a different model"):
        pipeline.evaluate(run)
