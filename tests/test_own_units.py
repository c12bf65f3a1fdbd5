"""The layer's own units as a baseline: their figures row by row, the control that is the same, and the verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import CONTEXTS, D_IN, SEQ_LEN, identity, kept_mean, make_blocks, random_sae, run, whole

from sae.analysis import baselines
from sae.dictionary.autoencoder import SAE
from sae.evaluation.evaluate import Block, evaluate
from sae.evaluation.own_units import ALREADY_SPARSE, NOT_BETTER, verdict
from sae.lm import NativeModel
from sae.lm.units import active_units, largest_units, participation_ratio, units_to_match


@given(st.integers(0, 10_000), st.integers(1, 9), st.booleans())
@settings(max_examples=50, deadline=None)
def test_figures_row_by_row(seed: int, k: int, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, 7)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = 0.0
    x = x if signed else np.maximum(x, 0)
    rows = torch.from_numpy(x)
    for row, active, ratio, kept in zip(
        x.astype(np.float64), active_units(rows), participation_ratio(rows), largest_units(rows, k), strict=True
    ):
        assert active == sum(a != 0 for a in row)
        assert float(ratio) == pytest.approx(sum(row**2) ** 2 / sum(row**4) if row.any() else 0.0, rel=1e-12)
        order = sorted(range(7), key=lambda unit: -abs(row[unit]))
        np.testing.assert_array_equal(kept, np.where(np.isin(np.arange(7), order[:k]), row, 0).astype(np.float32))


def test_equal_units_participate_alike_whatever_their_size_and_sign() -> None:
    x = torch.zeros(3, 10)
    x[0, :4], x[1, :4], x[2] = 1e-20, torch.tensor([1e20, -1e20, 1e20, -1e20]), 3.0
    assert participation_ratio(x).tolist() == pytest.approx([4, 4, 10])


def test_k_is_the_l0_rounded_and_between_one_and_all_units() -> None:
    assert [units_to_match(l0, 8) for l0 in (0.0, 0.3, 1.6, 7.4, 100.0)] == [1, 1, 2, 7, 8]


@pytest.mark.parametrize("signed", [False, True])
def test_the_control_of_the_same_name_reconstructs_the_same(signed: bool) -> None:
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.relu()
    control = baselines.made_without_training(x, 24, 5, only=["neurons_topk"])["neurons_topk"]
    torch.testing.assert_close(control.reconstruct(x), largest_units(x, 5))


def test_the_units_themselves_as_a_dictionary_show_nothing_new(tiny_model: NativeModel) -> None:
    blocks = make_blocks(tiny_model)
    result, _ = run(identity(), tiny_model, blocks)
    l0 = active_units(whole(blocks).acts)[whole(blocks).keep].double().mean().item()
    assert result["units"]["k"] == round(l0) < D_IN
    assert result["metrics"]["l0"]["value"] == pytest.approx(result["metrics"]["units_l0"]["value"])
    assert result["units"]["verdict"] == ALREADY_SPARSE


def test_a_dictionary_with_a_feature_for_each_row_is_better_than_one_unit(tiny_model: NativeModel) -> None:
    """Each row's own direction is the one most similar to it, so one feature gives x̂ = x; the text is the model's."""
    tokens = torch.arange(1, CONTEXTS + 1)[:, None]
    while tokens.shape[1] < SEQ_LEN:
        tokens = torch.cat([tokens, tiny_model.logits(tokens)[:, -1:].argmax(-1)], 1)
    keep, domain = torch.ones_like(tokens, dtype=torch.bool), np.zeros(tokens.shape, np.int64)
    blocks = [Block(tiny_model.capture(tokens, HOOK_POINT), tokens, keep, domain)]
    rows = torch.nn.functional.normalize(whole(blocks).acts.flatten(0, 1), dim=-1)
    sae = SAE(D_IN, len(rows), activation="topk", k=1).requires_grad_(False)
    sae.W_enc.copy_(rows.T)
    sae.W_dec.copy_(rows)
    result, _ = run(sae, tiny_model, blocks)
    assert result["metrics"]["ce_loss_score_zero"]["value"] == pytest.approx(1, abs=1e-5)
    assert result["metrics"]["topk_units_ce_loss_score_zero"]["value"] < 0.9
    assert (result["units"]["n_units"], result["units"]["k"]) == (D_IN, 1)
    assert (result["units"]["as_faithful"], result["units"]["verdict"]) == (False, None)


def test_a_dictionary_that_is_worse_than_the_units_is_called_so(tiny_model: NativeModel) -> None:
    result, _ = run(random_sae(), tiny_model, make_blocks(tiny_model))
    metrics = result["metrics"]
    assert metrics["ce_units"]["value"] < metrics["ce_sae"]["value"]
    assert result["units"]["verdict"] in (ALREADY_SPARSE, NOT_BETTER)
    dense = metrics["units_participation_ratio"]["value"] > result["units"]["k"]
    assert result["units"]["verdict"] == (NOT_BETTER if dense else ALREADY_SPARSE)


def measured(gain: float | None, low: float | None, ratio: float, fvu: float = 0.2) -> dict[str, dict[str, Any]]:
    return {
        "ce_gain_over_units": {"value": gain, "ci95": [low, gain]},
        "units_participation_ratio": {"value": ratio},
        "fvu": {"value": fvu},
        "topk_units_fvu": {"value": 0.3},
    }


def test_the_verdict_needs_a_gain_beyond_chance_and_says_why() -> None:
    assert verdict(measured(0.1, 0.05, 3.0), 20, 512)["verdict"] is None
    assert verdict(measured(0.1, -0.01, 3.0), 20, 512)["verdict"] == ALREADY_SPARSE
    assert verdict(measured(-0.1, -0.2, 90.0), 20, 512)["verdict"] == NOT_BETTER
    assert verdict(measured(None, None, 90.0), 20, 512)["verdict"] is None  # no losses: the lower FVU is better
    assert verdict(measured(None, None, 90.0, fvu=0.4), 20, 512)["verdict"] == NOT_BETTER


def test_blocks_that_can_be_read_once_only_are_refused(tiny_model: NativeModel) -> None:
    blocks = make_blocks(tiny_model)
    with pytest.raises(AssertionError, match="read several times"):
        evaluate(
            random_sae(),
            tiny_model,
            iter(blocks),
            hook_point=HOOK_POINT,
            heldout_mean=kept_mean(blocks),
            domains=[],
            train_mean=kept_mean(blocks),
            kept_tokens=1,
            donors=torch.zeros(1, D_IN),
            training=blocks,
        )
