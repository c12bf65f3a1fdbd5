"""Units that say what the token before was: found where they are set by hand, and their share of an induction head."""

from __future__ import annotations

import pytest
import torch
from test_circuits_heads import (
    POSITIONS,
    VOCAB,
    induction,  # noqa: F401
)
from torch import Tensor

from sae.circuits import heads, previous_token, units
from sae.circuits.key_measures import Dictionaries, Texts, key_measures
from sae.circuits.patching import path_patching, runs_of
from sae.circuits.sites import Site, heads_of
from sae.circuits.tasks import task_of
from sae.dictionary.autoencoder import SAE
from sae.lm import ModelError, NativeModel

OUT, Z = "blocks.0.hook_attn_out", "blocks.0.attn.hook_z"


@pytest.fixture(scope="module")
def dictionary() -> SAE:
    """Feature X is active where the head set by hand has written that X came before, and says just that."""
    made = SAE(2 * VOCAB + POSITIONS, VOCAB).requires_grad_(False)
    before = slice(VOCAB + POSITIONS, None)
    made.W_enc[before] = torch.eye(VOCAB)
    made.W_dec[:, before] = torch.eye(VOCAB)
    made.b_enc.fill_(-0.01)  # what softmax leaves at other positions
    return made


def texts(n: int, *, seed: int, length: int = 40, below: int = 20) -> Tensor:
    found = torch.randint(1, below, (n, length), generator=torch.Generator().manual_seed(seed))
    found[:, 0] = 0
    return found


def rows_of(model: NativeModel, found: units.Units, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and the token before, without the first position."""
    return found.acts(model.capture(tokens, found.hook_point))[:, 1:].flatten(0, 1), tokens[:, :-1].flatten()


def test_f1_of_rules_is_that_of_counting() -> None:
    generator = torch.Generator().manual_seed(1)
    acts = torch.rand(400, 6, generator=generator) * (torch.rand(400, 6, generator=generator) < 0.3)
    labels = torch.randint(0, 5, (400,), generator=generator)
    acts[labels == 2, 3] += 5.0  # one unit knows a label
    found = previous_token.rules_of((acts[:200], labels[:200]), (acts[200:], labels[200:]), 5)
    for unit in range(6):
        fires = acts[200:, unit] > found.threshold[unit]
        true = labels[200:] == found.token[unit]
        precision, recall = ((fires & true).sum() / max(1, int(part.sum())) for part in (fires, true))
        expected = float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0
        if fires.sum() >= previous_token.LEAST_FIRINGS:
            assert float(found.f1[unit]) == pytest.approx(expected, abs=1e-6)
        else:
            assert found.f1[unit].isnan()
    assert found.token[3] == 2
    assert found.f1[3] > 0.9
    assert found.good_share >= 1 / 6
    assert bool(found.covered(torch.tensor([2]))[0])


def test_a_unit_is_judged_on_text_that_did_not_choose_its_rule() -> None:
    """Blind units find a rule that fits the first text by chance, and fail on the second."""
    generator = torch.Generator().manual_seed(0)
    acts, labels = torch.rand(4000, 8, generator=generator), torch.randint(0, 200, (4000,), generator=generator)
    found = previous_token.rules_of((acts[:2000], labels[:2000]), (acts[2000:], labels[2000:]), 200)
    assert found.judged.sum() >= 6
    assert found.f1[found.judged].max() < 0.1
    assert found.good_share == 0


def test_units_set_by_hand_have_the_rule_and_the_whole_score(
    induction: NativeModel,  # noqa: F811
    dictionary: SAE,
) -> None:
    found = units.features(dictionary, OUT)
    rules = previous_token.rules_of(
        rows_of(induction, found, texts(20, seed=0)), rows_of(induction, found, texts(20, seed=1)), VOCAB
    )
    seen = rules.firings > 0
    assert seen.nonzero()[:, 0].tolist() == list(range(20))  # BOS and the words of the text
    assert torch.equal(rules.token[seen], torch.arange(20))
    assert rules.f1[seen].min() > 0.999
    repeated = heads.repeated_tokens(torch.arange(1, 20), length=12, copies=3, texts=3, bos_id=0)
    keys = previous_token.keys_of(induction, repeated, (1, 0), found, rules.token, (1, 2))
    whole = previous_token.advantage(induction, repeated, (1, 0), keys.whole)
    assert whole.min() > 1
    for part in (keys.matched, keys.largest[0], keys.largest[1], keys.all_units):
        share = previous_token.advantage(induction, repeated, (1, 0), part) / whole
        assert torch.allclose(share, torch.ones(3).double(), atol=0.02)
    others = previous_token.keys_of(induction, repeated, (1, 0), found, rules.token.roll(1), (1,)).matched
    assert previous_token.advantage(induction, repeated, (1, 0), others).abs().max() < 0.1 * whole.min()


def test_advantage_is_the_difference_of_mean_scores(induction: NativeModel) -> None:  # noqa: F811
    """By a loop over destinations and sources, from the model's own pattern: log A = score − a constant of the row."""
    tokens = heads.repeated_tokens(torch.arange(1, 20), length=6, copies=2, texts=2, bos_id=0)
    weights = induction.weights().layers[1]
    x = induction.capture(tokens, "blocks.1.hook_resid_pre")
    key = weights.ln1(x) @ weights.attn.W_K[0] + weights.attn.b_K[0]
    found = previous_token.advantage(induction, tokens, (1, 0), key)
    for row in range(2):
        scores = weights.attn.scores(weights.ln1(x[row]))[0].double()
        differences = []
        for dst in range(1, tokens.shape[1]):
            sources = range(1, dst)
            after = [s for s in sources if tokens[row, s - 1] == tokens[row, dst]]
            rest = [s for s in sources if s not in after]
            if after and rest:
                differences.append(scores[dst, after].mean() - scores[dst, rest].mean())
        assert float(found[row]) == pytest.approx(float(torch.stack(differences).mean()), rel=1e-5)


def test_components_and_head_dimensions_sum_to_what_attention_writes(induction: NativeModel) -> None:  # noqa: F811
    tokens = texts(4, seed=2)
    caught = induction.capture_all(tokens, [OUT, Z])
    out, z = (caught[name][:, 1:].flatten(0, 1) for name in (OUT, Z))
    bias = induction.weights().layers[0].attn.b_O
    made = {"components": (units.components(out, OUT), out), "dimensions": (units.head_dimensions(induction, z, Z), z)}
    for found, rows in made.values():
        acts = found.acts(rows)
        assert acts.min() >= 0
        constant = out.mean(0) if found.hook_point == OUT else z.mean(0) @ found.written[: z.shape[1]] + bias
        assert (acts @ found.written + constant - out).abs().max() < 1e-4


def test_units_by_prompt_move_only_those_chosen(induction: NativeModel, dictionary: SAE) -> None:  # noqa: F811
    found = units.features(dictionary, OUT)
    task = task_of(induction, "induction", 6)
    hooks = [OUT, Z, "blocks.1.attn.hook_z", "blocks.1.attn.hook_k"]
    runs = runs_of(induction, task, hooks)
    at_keys = heads_of(induction, [1], "k")
    everything = torch.ones(6, len(found), dtype=torch.bool)
    told = torch.zeros_like(everything)
    row = torch.arange(6)
    for place in ("first", "other"):
        told[row, task.clean[row, task.positions[place]]] = True
    senders = [
        units.UnitsByPrompt("all", OUT, units=found, chosen=everything),
        units.UnitsByPrompt("told", OUT, units=found, chosen=told),
        units.UnitsByPrompt("others", OUT, units=found, chosen=~told),
        Site("attention", OUT),
    ]
    measure = path_patching(runs, senders, at_keys, [Z, "blocks.1.attn.hook_z"])
    value = measure.value
    assert isinstance(value, Tensor)
    assert value[3, 0] < 0.05  # the whole answer travels into the key of the head set by hand
    assert torch.allclose(value[0], value[3], atol=0.05)
    assert torch.allclose(value[1], value[3], atol=0.05)
    assert torch.allclose(value[2], torch.ones(2).double(), atol=0.05)
    assert torch.allclose(value[:, 1], torch.ones(4).double(), atol=1e-6)  # a head that reads nothing


def test_the_measures_show_a_circuit_set_by_hand(induction: NativeModel, dictionary: SAE) -> None:  # noqa: F811
    found, labels, arrays = key_measures(
        induction,
        Dictionaries(dictionary, OUT, dictionary),
        Texts(*(texts(24, seed=seed, length=POSITIONS, below=120) for seed in (0, 1))),
        1,
        prompts=4,
        made_up=1,
    )
    assert labels["head"] == ["L1.head.0", "L1.head.1"]
    assert found["units_with_rule"].value == 1
    assert found["tokens_covered"].value > 0.6  # the other features fire fewer than 10 times
    for name in ("current_token", "shuffled_labels", "shuffled_model"):
        assert found["units_with_rule"].controls[name].value < 0.5, name
    share = found["share_of_score"]
    assert share.value[0] > 0.95
    assert abs(share.controls["shuffled_rules"].value[0]) < 0.2
    assert found["share_of_largest"].value.shape == (2, 5)
    assert found["into_k"].value[0] < 0.05
    assert found["into_k"].controls["whole_output"].value[0] < 0.05
    assert found["into_k"].controls["other_features"].value[0] > 0.7
    assert 0.15 < found["share_of_score_any"].value[0] < 0.7  # of the tokens there, a third is in the text
    assert labels["tokens_with_rule"] > 60
    assert arrays["rule_token"].shape == (VOCAB,)
    with pytest.raises(ModelError, match="before layer 0"):
        key_measures(induction, Dictionaries(dictionary, OUT), Texts(texts(2, seed=0), texts(2, seed=1)), 0)
