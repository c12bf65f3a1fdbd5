"""Steering against a splice computed here from the model's own weights; sampling against the softmax."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT, random_sae
from hypothesis import given
from hypothesis import strategies as st

from sae.circuits.erasure import Eraser
from sae.dictionary.autoencoder import SAE
from sae.interventions.edits import MAX_EDITS, Edit, Erasure, scaled, splice_edits
from sae.interventions.steering import Generation, Steered, _gumbel, _kl, _sample, next_tokens, steer, sweep_stream
from sae.lm import NativeModel, Splice

D_IN, D_SAE, DEAD = 32, 24, 5
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def sae() -> SAE:
    made = random_sae(D_IN, d_sae=D_SAE)
    made.b_enc[DEAD] = -1e3
    return made


@pytest.fixture(scope="module")
def feature_max() -> np.ndarray:
    largest = np.linspace(1, 3, D_SAE).astype(np.float32)
    largest[DEAD] = 0
    return largest


def wanted_activation(edit: Edit, a: float, largest: float) -> float:
    return {"set": edit.value * largest, "add": a + edit.value * largest, "scale": edit.value * a, "ablate": 0.0}[
        edit.mode
    ]


def brute_force(sae: SAE, x: torch.Tensor, edits: list[Edit], feature_max: np.ndarray) -> torch.Tensor:
    """x + Σ (v − a) · W_dec, one row and one feature at a time, float64."""
    out = x.double().clone()
    for row in out.view(-1, D_IN):
        before = row.clone()
        for edit in edits:
            column = sae.W_enc[:, edit.feature].double()
            a = max(0.0, float((before - sae.b_dec.double()) @ column + sae.b_enc[edit.feature].double()))
            v = wanted_activation(edit, a, float(feature_max[edit.feature]))
            row += (v - a) * sae.W_dec[edit.feature].double()
    return out


EDITS = {
    "set": [Edit(2, "set", 5.0)],
    "add": [Edit(2, "add", -1.5)],
    "scale": [Edit(2, "scale", 3.0)],
    "ablate": [Edit(2, "ablate")],
    "several": [Edit(2, "set", 2.0), Edit(7, "ablate"), Edit(9, "scale", 0.5), Edit(11, "add", 1.0)],
}


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS.keys())
def test_the_delta_form(sae: SAE, feature_max: np.ndarray, edits: list[Edit]) -> None:
    x = torch.randn(2, 6, D_IN, generator=torch.Generator().manual_seed(0)).relu() * 2
    found = splice_edits(sae, edits, feature_max)(x)
    torch.testing.assert_close(found.double(), brute_force(sae, x, edits, feature_max), rtol=1e-5, atol=1e-5)
    # what the dictionary does not explain of x is kept: not x̂, but x, is moved
    assert not torch.allclose(found, sae(x), atol=0.1)


def test_topk_dictionaries_are_steered_by_their_own_activations(feature_max: np.ndarray) -> None:
    """A feature outside the k largest has a = 0, though its pre-activation is positive."""
    made = SAE(D_IN, D_SAE, activation="topk", k=1).requires_grad_(False)
    made.W_enc.copy_(torch.randn(D_IN, D_SAE, generator=torch.Generator().manual_seed(0)))
    made.W_dec.copy_(made.W_enc.T)
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    moved = splice_edits(made, [Edit(4, "ablate")], feature_max)(x)
    first = made.pre_acts(x).argmax(1) == 4
    assert first.any()
    assert torch.equal(moved[~first], x[~first])
    assert not torch.equal(moved[first], x[first])


def test_scale_one_and_no_edit_change_nothing_at_all(
    sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray
) -> None:
    x = torch.randn(3, 4, D_IN)
    for edits in ([Edit(2, "scale", 1.0)], [Edit(DEAD, "ablate")], [Edit(i, "scale", 1.0) for i in range(20)], []):
        assert torch.equal(splice_edits(sae, edits, feature_max)(x), x)
        found = steer(tiny_model, sae, PROMPT, edits, seed=1, max_new_tokens=12, feature_max=feature_max)
        assert found.base_ids == found.steered_ids
        assert found.first_divergence is None
        assert found.kl == [0.0] * 12


def test_set_zero_is_ablate(sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray) -> None:
    x = torch.randn(3, 4, D_IN)
    zero, ablated = (splice_edits(sae, [edit], feature_max)(x) for edit in (Edit(2, "set", 0.0), Edit(2, "ablate")))
    assert torch.equal(zero, ablated)
    assert not torch.equal(zero, x)


def test_edits_of_one_feature_are_made_one_after_another(sae: SAE, feature_max: np.ndarray) -> None:
    """Each edit starts from the activation that the previous one left: ablating twice is ablating once."""
    x = torch.randn(3, 4, D_IN) * 3

    def moved(*edits: Edit) -> torch.Tensor:
        return splice_edits(sae, edits, feature_max)(x)

    once = moved(Edit(2, "ablate"))
    assert not torch.equal(once, x)
    torch.testing.assert_close(moved(Edit(2, "ablate"), Edit(2, "set", 0.0)), once)
    torch.testing.assert_close(moved(Edit(2, "set", 1.0), Edit(2, "scale", 3.0)), moved(Edit(2, "set", 3.0)))
    torch.testing.assert_close(moved(Edit(2, "add", 1.0), Edit(2, "add", 1.0)), moved(Edit(2, "add", 2.0)))


def test_only_where_active_leaves_the_other_positions_alone(sae: SAE, feature_max: np.ndarray) -> None:
    x = torch.randn(4, 9, D_IN, generator=torch.Generator().manual_seed(0)) * 2
    active = sae.encode(x)[..., 2] > 0
    assert active.any()
    assert not active.all()
    for mode in ("set", "add"):
        everywhere = splice_edits(sae, [Edit(2, mode, 4.0)], feature_max)(x)
        moved = splice_edits(sae, [Edit(2, mode, 4.0, only_active=True)], feature_max)(x)
        assert torch.equal(moved[~active], x[~active])
        assert torch.equal(moved[active], everywhere[active])


def test_a_multiple_of_the_99th_percentile(sae: SAE, feature_max: np.ndarray) -> None:
    """The same edit as with that many multiples of the maximum."""
    x = torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(0))
    p99 = feature_max / 4
    found = splice_edits(sae, [Edit(2, "set", 8.0, "p99")], feature_max, p99)(x)
    torch.testing.assert_close(found, splice_edits(sae, [Edit(2, "set", 2.0)], feature_max)(x))
    with pytest.raises(ValueError, match="multiples of the p99, but feature_p99 was not given"):
        splice_edits(sae, [Edit(2, "set", 8.0, "p99")], feature_max)
    with pytest.raises(ValueError, match="feature 5 never fired, so it has no 99th percentile to take multiples of"):
        splice_edits(sae, [Edit(DEAD, "add", 1.0, "p99")], feature_max, p99)


@given(
    st.builds(
        Edit,
        st.integers(0, 10**6),
        st.sampled_from(["set", "add", "scale"]),
        st.floats(-1e3, 1e3).map(lambda v: float(f"{v:g}")),
        st.just("max"),
        st.booleans(),
    )
)
def test_an_edit_is_read_back_as_written(edit: Edit) -> None:
    assert Edit.parse(str(edit)) == edit


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("12:set:5", Edit(12, "set", 5.0)),
        (" 12:set:5x:p99:active ", Edit(12, "set", 5.0, "p99", True)),
        ("7:ablate", Edit(7, "ablate")),
        ("7:ablate:active", Edit(7, "ablate", only_active=True)),
        ("9:scale:0.5:max", Edit(9, "scale", 0.5)),
    ],
)
def test_edits_are_read_in_every_notation(text: str, edit: Edit) -> None:
    assert Edit.parse(text) == edit
    assert Edit.parse(str(edit)) == edit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' in '' is not a feature number"),
        ("-1:set:5", "'-1' in '-1:set:5' is not a feature number"),
        ("12", "mode must be one of"),
        ("12:clamp:5", "mode must be one of set, add, scale, ablate; got 'clamp'"),
        ("12:set", "'12:set' has no value for 'set'"),
        ("12:set:five", "'five' in '12:set:five' is not a number"),
        ("12:set:nan", "finite number"),
    ],
)
def test_unreadable_edits_are_refused_by_part(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Edit.parse(text)


# --- generation ------------------------------------------------------------------------------------------------------

STRONG = [Edit(2, "set", 30.0)]


def but_at_bos(splice: Splice, tokens: torch.Tensor) -> Splice:
    """BOS is token 0 of the tiny model."""
    return lambda x: torch.where(tokens[..., None] == 0, x, splice(x))


def greedy_by_hand(model: NativeModel, sae: SAE, ids: list[int], n: int, edits: list[Edit], feature_max) -> list[int]:
    module, layer, new = model.module, model.module.blocks[0], []
    for _ in range(n):
        tokens = torch.tensor([(ids + new)[-model.context_tokens :]])
        resid = module.resid_pre(tokens)
        resid = resid + layer.attn(layer.ln1(resid))
        post = layer.mlp.post(layer.ln2(resid))
        edited = brute_force(sae, post, edits, feature_max).float()
        post = torch.where(tokens[..., None] == model.bos_id, post, edited)
        logits = module.unembed(module.ln_final(resid + layer.mlp.out(post)))
        new.append(int(logits[0, -1].argmax()))
    return new


def test_greedy_text_is_the_argmax_of_the_model_and_of_the_spliced_model(
    sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray
) -> None:
    found = steer(tiny_model, sae, PROMPT, STRONG, max_new_tokens=10, temperature=0.0, feature_max=feature_max)
    assert found.prompt_ids == [0, *tiny_model.tokenizer.encode(PROMPT).ids]
    assert found.base_ids == greedy_by_hand(tiny_model, sae, found.prompt_ids, 10, [], feature_max)
    assert found.steered_ids == greedy_by_hand(tiny_model, sae, found.prompt_ids, 10, STRONG, feature_max)
    assert found.base_ids != found.steered_ids
    assert found.base_text == tiny_model.tokenizer.decode(found.base_ids, skip_special_tokens=False)
    assert found.steered_text == tiny_model.tokenizer.decode(found.steered_ids, skip_special_tokens=False)
    for i, (base, steered) in enumerate(zip(found.base_ids, found.steered_ids, strict=True)):
        assert (i < found.first_divergence) <= (base == steered)
        assert (i == found.first_divergence) <= (base != steered)


def test_a_seed_fixes_the_text_and_edits_leave_the_base_text_unchanged(
    sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray
) -> None:
    def run(seed: int, edits: list[Edit]) -> Steered:
        return steer(tiny_model, sae, PROMPT, edits, seed=seed, max_new_tokens=15, feature_max=feature_max)

    first = run(4, STRONG)
    assert run(4, STRONG) == first
    assert run(4, [Edit(9, "set", 20.0)]).base_ids == first.base_ids
    assert run(5, STRONG).base_ids != first.base_ids


def test_the_stream_yields_one_more_token_each_time(sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray) -> None:
    steps = sweep_stream(
        tiny_model, sae, PROMPT, STRONG, (1.0,), Generation(2, max_new_tokens=6), feature_max=feature_max
    )
    lengths = [(len(s.base_ids), len(s.steered_ids), len(s.kl)) for (s,) in steps]
    assert lengths == [(i, i, i) for i in range(1, 7)]
    assert not tiny_model.lock.locked()


def test_kl_compares_the_two_distributions_on_the_steered_text(
    sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray
) -> None:
    found = steer(tiny_model, sae, PROMPT, STRONG, seed=0, max_new_tokens=6, feature_max=feature_max)
    for i, kl in enumerate(found.kl):
        tokens = torch.tensor([found.prompt_ids + found.steered_ids[:i]])
        splice = but_at_bos(splice_edits(sae, STRONG, feature_max), tokens)
        p = tiny_model.logits(tokens, HOOK_POINT, splice)[0, -1].double().softmax(-1)
        q = tiny_model.logits(tokens)[0, -1].double().softmax(-1)
        assert kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert min(found.kl) > 0


def test_a_prompt_longer_than_the_context_is_continued_from_its_end(
    sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray
) -> None:
    prompt = "the quick brown fox jumps over " * 12
    found = steer(tiny_model, sae, prompt, STRONG, max_new_tokens=5, temperature=0.0, feature_max=feature_max)
    assert len(found.prompt_ids) > tiny_model.context_tokens
    assert found.base_ids == greedy_by_hand(tiny_model, sae, found.prompt_ids, 5, [], feature_max)


def test_an_empty_prompt_starts_at_bos(sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray, monkeypatch) -> None:
    found = steer(tiny_model, sae, "", STRONG, max_new_tokens=2, feature_max=feature_max)
    assert found.prompt_ids == [tiny_model.bos_id]
    monkeypatch.setattr(tiny_model, "bos_id", None)
    with pytest.raises(ValueError, match="the prompt is empty and this model has no BOS"):
        steer(tiny_model, sae, "", STRONG, max_new_tokens=2, feature_max=feature_max)


def test_each_row_of_a_sweep_is_that_text_steered_alone(
    sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray
) -> None:
    edits, factors = [Edit(2, "set", 3.0), Edit(7, "add", 2.0), Edit(9, "ablate")], (0.0, 1.0, 5.0)
    generation = Generation(seed=3, max_new_tokens=8)
    *_, rows = sweep_stream(tiny_model, sae, PROMPT, edits, factors, generation, feature_max=feature_max)
    for factor, row in zip(factors, rows, strict=True):
        edited = scaled(edits, factor)
        alone = steer(tiny_model, sae, PROMPT, edited, seed=3, max_new_tokens=8, feature_max=feature_max)
        assert (row.base_ids, row.steered_ids) == (alone.base_ids, alone.steered_ids)
        assert row.kl == pytest.approx(alone.kl, rel=1e-4, abs=1e-6)
    assert len({tuple(row.steered_ids) for row in rows}) == 3
    with pytest.raises(ValueError, match="at least one factor"):
        sweep_stream(tiny_model, sae, PROMPT, edits, (), generation, feature_max=feature_max)


def test_a_factor_of_zero_sets_to_zero_and_adds_nothing() -> None:
    assert scaled([Edit(1, "set", 5.0), Edit(2, "ablate"), Edit(3, "scale", 2.0)], 0.0) == [
        Edit(1, "set", 0.0),
        Edit(2, "ablate"),
        Edit(3, "scale", 0.0),
    ]


def test_surprisal_and_perplexity_are_the_base_models(
    sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray
) -> None:
    """Of both texts, from one pass over each finished text."""
    found = steer(tiny_model, sae, PROMPT, STRONG, seed=0, max_new_tokens=6, feature_max=feature_max)
    for ids, surprisal, perplexity in (
        (found.base_ids, found.base_surprisal, found.base_perplexity),
        (found.steered_ids, found.steered_surprisal, found.steered_perplexity),
    ):
        losses = tiny_model.token_losses(torch.tensor([found.prompt_ids + ids]))[0, -6:].tolist()
        assert surprisal == pytest.approx(losses, rel=1e-4)
        assert perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert found.steered_perplexity > found.base_perplexity
    assert np.isnan(Steered([0]).base_perplexity)


def test_next_tokens_before_and_after(sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray) -> None:
    ids = tiny_model.encode_prompt(PROMPT)
    found = next_tokens(tiny_model, sae, ids, STRONG, n=7, feature_max=feature_max)
    tokens = torch.tensor([ids])
    base = tiny_model.logits(tokens)[0, -1].softmax(-1)
    splice = but_at_bos(splice_edits(sae, STRONG, feature_max), tokens)
    steered = tiny_model.logits(tokens, HOOK_POINT, splice)[0, -1].softmax(-1)
    assert len(found.ids) == len(set(found.ids)) == 7
    assert found.base == pytest.approx(base[found.ids].tolist(), rel=1e-4)
    assert found.steered == pytest.approx(steered[found.ids].tolist(), rel=1e-4)
    left_out = torch.maximum(base, steered)
    left_out[found.ids] = 0
    assert float(left_out.max()) <= max(found.base[-1], found.steered[-1])
    one = steer(tiny_model, sae, PROMPT, STRONG, max_new_tokens=1, feature_max=feature_max)
    assert found.kl == pytest.approx(one.kl[0])


def test_concurrent_users_get_the_texts_they_would_get_alone(
    sae: SAE, tiny_model: NativeModel, feature_max: np.ndarray
) -> None:
    def run(value: float) -> list[int]:
        edits = [Edit(2, "set", value)]
        return steer(tiny_model, sae, PROMPT, edits, seed=1, max_new_tokens=12, feature_max=feature_max).steered_ids

    values = [0.0, 5.0, 30.0, 60.0] * 2
    alone = [run(value) for value in values]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, values)) == alone
    assert not tiny_model.lock.locked()


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_distributed_as_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, 0.5, -3.0])
    generator, n = torch.Generator().manual_seed(0), 8000
    drawn = [_sample(logits, temperature, _gumbel(6, generator)) for _ in range(n)]
    expected = n * (logits.double() / temperature).softmax(-1).numpy()
    seen = np.bincount(drawn, minlength=6)
    assert float(((seen - expected) ** 2 / expected).sum()) < 20.5  # 5 degrees of freedom, p = 0.001
    assert seen[0] > seen[1]


def test_shared_noise_couples_the_columns() -> None:
    """A small change of the logits rarely changes the token; independent draws would differ half of the time."""
    logits, generator = torch.randn(50, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(0)
    changed = logits + 0.05 * torch.randn(50, generator=torch.Generator().manual_seed(2))
    noises = [_gumbel(50, generator) for _ in range(500)]
    differ = sum(_sample(logits, 1.0, noise) != _sample(changed, 1.0, noise) for noise in noises)
    assert 0 < differ < 50


def test_temperature_zero_ignores_the_noise() -> None:
    noise = torch.tensor([100.0, 0.0, 0.0])
    assert _sample(torch.tensor([0.0, 1.0, 0.5]), 0.0, noise) == 1


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    assert _kl(p.log(), q.log() + 3) == pytest.approx(0.25 * np.log(2))
    assert _kl(p.log(), p.log()) == 0
    assert _kl(torch.randn(9), torch.randn(9)) > 0


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Edit(D_SAE)], "feature 24 does not exist; features are 0 … 23"),
        ([Edit(-1)], "feature -1 does not exist"),
        ([Edit(DEAD, "set", 1.0)], "feature 5 never fired"),
        ([Edit(DEAD, "add", 1.0)], "feature 5 never fired"),
        ([Edit(1)] * (MAX_EDITS + 1), f"at most {MAX_EDITS} edits at once; got {MAX_EDITS + 1}"),
    ],
)
def test_edits_of_missing_or_silent_features_are_refused(
    sae: SAE, tiny_model, feature_max: np.ndarray, edits: list[Edit], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        steer(tiny_model, sae, PROMPT, edits, feature_max=feature_max)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "clamp"), "one of set, add, scale, ablate; got 'clamp'"),
        ((1, "set", float("nan")), "finite number"),
        ((1, "set", float("inf")), "finite number"),
    ],
)
def test_invalid_edits_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Edit(*arguments)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or a positive number; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or a positive number; got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"feature_max": np.ones(3)}, "feature_max has 3 entries, the dictionary 24 features"),
    ],
)
def test_invalid_settings_are_refused(
    sae: SAE, tiny_model: NativeModel, feature_max, keywords: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        steer(tiny_model, sae, PROMPT, STRONG, **{"feature_max": feature_max, **keywords})


def test_a_dictionary_without_a_hook_point_asks_for_one(tiny_model: NativeModel, feature_max: np.ndarray) -> None:
    bare = SAE(D_IN, D_SAE).requires_grad_(False)
    with pytest.raises(ValueError, match="name hook_point"):
        steer(tiny_model, bare, PROMPT, STRONG, feature_max=feature_max)
    steer(tiny_model, bare, PROMPT, STRONG, feature_max=feature_max, max_new_tokens=1, hook_point=HOOK_POINT)


def test_a_transcoder_without_a_later_target_is_refused(tiny_model: NativeModel, feature_max: np.ndarray) -> None:
    skipping, backwards = SAE(D_IN, D_SAE, skip=True), SAE(D_IN, D_SAE)
    backwards.config = {"hook_point": HOOK_POINT, "target_hook_point": "blocks.0.hook_resid_mid"}
    for made, said in ((skipping, "which hook point it predicts"), (backwards, "which comes before it")):
        with pytest.raises(ValueError, match=said):
            steer(tiny_model, made, PROMPT, [Edit(1, "ablate")], feature_max=feature_max, hook_point=HOOK_POINT)
        with pytest.raises(ValueError, match="is a transcoder"):
            splice_edits(made, [Edit(1, "ablate")])


@given(st.integers(0, 2**16), st.integers(1, 6))
def test_erasures_act_after_the_edits_of_features(seed: int, rank: int) -> None:
    """x moved by features, then what is along the subspace becomes its mean's; in float64, one row at a time."""
    generator = torch.Generator().manual_seed(seed)
    sae, largest = random_sae(D_IN, d_sae=D_SAE), np.ones(D_SAE, np.float32)
    x, mean = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((1, 3, D_IN), (D_IN,)))
    basis = torch.linalg.qr(torch.randn(D_IN, rank, generator=generator, dtype=torch.float64)).Q
    eraser = Eraser(basis @ basis.T, mean, rank)
    edits = [Erasure("dna", eraser), Edit(2, "set", 3.0)]
    found = splice_edits(sae, edits, largest)(x.float()).double()
    moved = brute_force(sae, x, [Edit(2, "set", 3.0)], largest)
    for row, wanted in zip(found[0], moved[0], strict=True):
        kept = wanted - sum(((wanted - mean) @ axis) * axis for axis in basis.T)
        assert (row - kept).abs().max() < 1e-4
        assert ((row - mean) @ basis).abs().max() < 1e-4
    assert str(edits[0]) == "erase:dna"
    assert scaled(edits, 0.0)[0] is edits[0]
