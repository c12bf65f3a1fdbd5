"""The closed form against a re-run of the model, and the re-run against a splice computed here."""

from __future__ import annotations

import pytest
import torch
from fakes import SHAPE, write_model

from sae.interventions.ablation import Ablated, ablate, has_closed_form
from sae.lm import NativeModel
from sae.lm.transformer import TransformerConfig

HOOKS = ("blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post")


def planted(model: NativeModel, hook_point: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A direction, tokens, and activations that are zero at most positions."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(model.hook_width(hook_point), generator=generator)
    tokens = torch.randint(0, model.d_vocab, (5, 17), generator=generator)
    acts = torch.rand(5, 17, generator=generator) * (torch.rand(5, 17, generator=generator) < 0.3)
    acts[3] = 0.0  # a context without a firing
    return direction / direction.norm(), tokens, 4 * acts


def as_dict(found: Ablated) -> dict[tuple[int, int], tuple[float, float]]:
    places = zip(found.context.tolist(), found.position.tolist(), strict=True)
    return dict(zip(places, zip(found.loss.tolist(), found.loss_ablated.tolist(), strict=True), strict=True))


@pytest.mark.parametrize("hook_point", HOOKS)
def test_the_closed_form_equals_a_second_run_in_a_one_layer_model(tiny_model: NativeModel, hook_point: str) -> None:
    direction, tokens, acts = planted(tiny_model, hook_point)
    assert has_closed_form(tiny_model, hook_point)
    closed = ablate(tiny_model, direction, tokens, acts, hook_point)
    again = ablate(tiny_model, direction, tokens, acts, hook_point, closed_form=False)
    ours, theirs = as_dict(closed), as_dict(again)
    assert set(ours) == {(c, p + 1) for c, p in torch.nonzero(acts[:, :-1] > 0).tolist()}
    for place, (loss, ablated) in theirs.items():
        if place in ours:
            assert ours[place] == pytest.approx((loss, ablated), abs=2e-4)
        else:  # a prediction made where the feature is silent does not move
            assert ablated == pytest.approx(loss, abs=2e-4)
    kept = [i for i, place in enumerate(theirs) if place in ours]
    torch.testing.assert_close(closed.raised, again.raised[kept], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(closed.lowered, again.lowered[kept], atol=2e-4, rtol=1e-4)
    assert (closed.loss_ablated - closed.loss).abs().max() > 0.01


def test_losses_are_those_of_a_model_spliced_by_hand(tiny_model: NativeModel) -> None:
    direction, tokens, acts = planted(tiny_model, HOOKS[0], seed=1)
    found = ablate(tiny_model, direction, tokens, acts, HOOKS[0])
    clean = tiny_model.token_losses(tokens)
    cut = tiny_model.token_losses(tokens, HOOKS[0], lambda x: x - acts[..., None] * direction)
    torch.testing.assert_close(found.loss, clean[found.context, found.position - 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss_ablated, cut[found.context, found.position - 1], atol=1e-4, rtol=1e-4)


def test_changes_of_logits_are_largest_first_with_the_median_at_zero(tiny_model: NativeModel) -> None:
    direction, tokens, acts = planted(tiny_model, HOOKS[0], seed=2)
    found = ablate(tiny_model, direction, tokens, acts, HOOKS[0], top=4)
    change = tiny_model.logits(tokens) - tiny_model.logits(tokens, HOOKS[0], lambda x: x - acts[..., None] * direction)
    for i in range(len(found.context)):
        row = change[found.context[i], found.position[i] - 1]
        row = row - row.median()
        torch.testing.assert_close(found.raised[i], row.sort(descending=True).values[:4], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(row[found.lowered_ids[i]], found.lowered[i], atol=2e-4, rtol=1e-3)


def test_only_shown_tokens_are_computed(tiny_model: NativeModel) -> None:
    direction, tokens, acts = planted(tiny_model, HOOKS[0])
    shown = torch.zeros_like(tokens, dtype=torch.bool)
    shown[:, 5:9] = True
    for closed_form in (True, False):
        found = ablate(tiny_model, direction, tokens, acts, HOOKS[0], shown=shown, closed_form=closed_form)
        whole = as_dict(ablate(tiny_model, direction, tokens, acts, HOOKS[0], closed_form=closed_form))
        expected = {place: losses for place, losses in whole.items() if 5 <= place[1] < 9}
        assert as_dict(found).keys() == expected.keys()
        for place, losses in as_dict(found).items():
            assert losses == pytest.approx(expected[place], abs=1e-4)


def test_a_feature_that_never_fires_changes_nothing(tiny_model: NativeModel) -> None:
    direction, tokens, acts = planted(tiny_model, HOOKS[0])
    for closed_form in (True, False):
        assert len(ablate(tiny_model, direction, tokens, 0 * acts, HOOKS[0], closed_form=closed_form).loss) == 0


def test_deeper_models_get_a_second_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = TransformerConfig(**{**SHAPE.to_dict(), "n_layers": 2})
    model = NativeModel(write_model(tmp_path_factory.mktemp("deep") / "m", shape=shape), "deep")
    assert not has_closed_form(model, "blocks.0.mlp.hook_post")
    assert has_closed_form(model, "blocks.1.mlp.hook_post")
    assert not has_closed_form(model, "blocks.1.hook_resid_mid")
    direction, tokens, acts = planted(model, "blocks.0.mlp.hook_post")
    found = ablate(model, direction, tokens, acts, "blocks.0.mlp.hook_post")
    # the second layer carries a firing on to later tokens
    first = {c: int(torch.nonzero(acts[c])[0]) for c in range(5) if acts[c].any()}
    assert set(as_dict(found)) == {(c, p) for c, f in first.items() for p in range(f + 1, 17)}
    cut = model.token_losses(tokens, "blocks.0.mlp.hook_post", lambda x: x - acts[..., None] * direction)
    torch.testing.assert_close(found.loss_ablated, cut[found.context, found.position - 1], atol=1e-4, rtol=1e-4)
