"""Head scores on an induction circuit set by hand, and against TransformerLens' head detector and hooks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import SHAPE, write_model
from torch import Tensor
from torch.nn import functional as F

from sae.circuits import growth, heads, weights
from sae.lm import LanguageModel, NativeModel, load_model
from sae.lm.pretrain import write_model as write_weights
from sae.lm.transformer import Transformer

ATTN = replace(SHAPE, n_layers=2, attn_only=True)
VOCAB, POSITIONS = 300, 64


@pytest.fixture(scope="module")
def induction(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> NativeModel:
    """Head 0.0 attends to the token before and writes what it was; head 1.0 looks for that in its keys, and copies.

    The stream holds three one-hot blocks: token, position, token before. Heads 0.1 and 1.1 do nothing.
    """
    width = 2 * VOCAB + POSITIONS
    shape = replace(ATTN, d_model=width, d_head=VOCAB, n_ctx=POSITIONS, d_vocab=VOCAB)
    model = Transformer(shape).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    eye = torch.eye(VOCAB)
    token, position, before = slice(0, VOCAB), slice(VOCAB, VOCAB + POSITIONS), slice(VOCAB + POSITIONS, width)
    model.embed.weight[:, token] = eye
    model.pos_embed.weight[:, position] = torch.eye(POSITIONS)
    model.unembed.weight[:, token] = eye
    first, second = (block.attn for block in model.blocks)
    head = slice(0, VOCAB)
    sharp = 60.0
    first.q.weight[head, position][:POSITIONS] = sharp * torch.eye(POSITIONS)
    first.k.weight[head, position][:POSITIONS] = torch.eye(POSITIONS).roll(1, 0)  # the key of j is the query of j + 1
    first.v.weight[head, token] = eye
    first.o.weight[before, head] = eye
    second.q.weight[head, token] = sharp * eye
    second.k.weight[head, before] = eye
    second.v.weight[head, token] = eye
    second.o.weight[token, head] = 20 * eye
    directory = tmp_path_factory.mktemp("induction")
    shutil.copyfile(tiny_model_dir / "tokenizer.json", directory / "tokenizer.json")
    write_weights(model, directory)
    return NativeModel(directory, "by hand")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    return NativeModel(write_model(tmp_path_factory.mktemp("heads") / "m", shape=ATTN), "random")


@pytest.fixture(scope="module")
def bridge(model: NativeModel) -> Any:
    return model.bridge()


def made_up(model: LanguageModel, length: int, copies: int, texts: int = 3, seed: int = 0) -> Tensor:
    pool = heads.ordinary_tokens(model)
    return heads.repeated_tokens(pool, length=length, copies=copies, texts=texts, bos_id=model.bos_id, seed=seed)


def test_made_up_text_is_bos_and_copies_of_different_tokens(model: NativeModel) -> None:
    rows = made_up(model, 7, 4)
    assert rows.shape == (3, 29)
    assert (rows[:, 0] == model.bos_id).all()
    for row in rows[:, 1:]:
        assert len(row[:7].unique()) == 7
        assert model.bos_id not in row
        assert torch.equal(row, row[:7].repeat(4))
    with pytest.raises(ValueError, match="too few for 400 different"):
        made_up(model, 400, 1)


def test_ordinary_tokens_are_those_in_the_middle_of_the_frequencies(model: NativeModel) -> None:
    text = torch.cat([torch.full((300 - i,), i) for i in range(300)])[None]
    pool = heads.ordinary_tokens(model, text).tolist()
    assert sorted(pool) == list(range(30, 270))


def test_the_scores_of_a_circuit_set_by_hand(induction: NativeModel) -> None:
    repeated, plain = made_up(induction, 10, 4), made_up(induction, 40, 1)
    prefix = heads.prefix_matching(induction, repeated).mean
    assert prefix[1, 0] > 0.99
    assert prefix.flatten()[[0, 1, 3]].max() < 0.1
    assert heads.same_cells_without_repeats(induction, repeated, plain).mean.max() < 0.1
    before, first = heads.previous_token(induction, plain)
    assert before.mean[0, 0] > 0.99
    assert first.mean[0, 0] < 0.01
    assert before.mean.flatten()[1:].max() < 0.15
    assert heads.copying(induction, plain).mean[1, 0] > 0.99
    assert weights.copying_scores(induction)[1, 0] == pytest.approx(1, abs=0.01)
    assert weights.k_composed_matching(induction, 1)[0, 0] == pytest.approx(1, abs=0.01)
    k = weights.composition_scores(induction, "k")
    assert k[0, 2] == pytest.approx(300**-0.5, rel=0.02)  # ‖I‖ / (‖I‖ ‖I‖), I of rank 300
    assert k[1, 2] == k[0, 3] == k[1, 3] == 0
    assert weights.composition_scores(induction, "q")[0, 2] < 0.05


def test_without_either_head_the_repeat_is_not_foretold(induction: NativeModel) -> None:
    text = made_up(induction, 20, 2)
    means = heads.mean_outputs(induction, made_up(induction, 40, 1))
    for kind in ("zero", "mean"):
        found = heads.ablate_heads(induction, text, kind, means=means if kind == "mean" else None)  # type: ignore[arg-type]
        assert found.second_clean.max() < 0.01
        assert found.first_clean.min() > 3
        lost = found.second.mean(0)
        assert lost[0, 0] > 3
        assert lost[1, 0] > 3
        assert lost[:, 1].max() < 0.01
    with pytest.raises(ValueError, match="mean ablation needs the means"):
        heads.ablate_heads(induction, text, "mean")


def test_scores_are_those_of_transformer_lens_head_detector(model: NativeModel, bridge: Any) -> None:
    """Its score is attention on the pattern per unit of all attention; ours per destination that has such a place."""
    from transformer_lens import head_detector

    row = made_up(model, 7, 4, texts=1)
    _, cache = bridge.run_with_cache(row)
    induction = head_detector.get_induction_head_detection_pattern(row)
    before = head_detector.get_previous_token_head_detection_pattern(row)
    cells = heads.after_earlier_copy(row)
    assert torch.equal(cells[0].float(), induction)
    prefix, (previous, first) = heads.prefix_matching(model, row).mean, heads.previous_token(model, row)
    for layer in range(2):
        for head in range(2):
            pattern = cache["pattern", layer][0, head]

            def theirs(wanted: Tensor, pattern: Tensor = pattern) -> float:
                return head_detector.compute_head_attention_similarity_score(
                    pattern, wanted, exclude_bos=False, exclude_current_token=False, error_measure="mul"
                ) * len(wanted)  # rows of a pattern sum to 1

            assert float(prefix[layer, head]) == pytest.approx(theirs(induction) / int(cells.any(-1).sum()), abs=1e-5)
            expected = (theirs(before) - float(pattern[1, 0])) / (len(pattern) - 2)
            assert float(previous.mean[layer, head]) == pytest.approx(expected, abs=1e-5)
            assert float(first.mean[layer, head]) == pytest.approx(float(pattern[2:, 0].mean()), abs=1e-5)


def test_ablation_is_that_of_transformer_lens_hooks(model: NativeModel, bridge: Any) -> None:
    text = made_up(model, 9, 2)
    means = heads.mean_outputs(model, made_up(model, 20, 1, texts=4))
    for kind in ("zero", "mean"):
        found = heads.ablate_heads(model, text, kind, means=means if kind == "mean" else None)  # type: ignore[arg-type]
        for layer in range(2):
            for head in range(2):
                value = means[layer].view(2, 8)[head] if kind == "mean" else 0.0

                def replace_head(z: Tensor, hook: Any, head: int = head, value: Any = value) -> Tensor:
                    z = z.clone().view(*z.shape[:2], 2, 8)
                    z[:, :, head] = value
                    return z.view(*z.shape[:2], -1) if hook.name.endswith("flat") else z

                with torch.no_grad():
                    logits = bridge.run_with_hooks(text, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", replace_head)])
                losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")
                assert torch.allclose(found.second[:, layer, head], losses[:, 10:].mean(1), atol=1e-5)
                assert torch.allclose(found.first[:, layer, head], losses[:, 1:9].mean(1), atol=1e-5)


def test_copying_equals_a_loop_over_destinations(model: NativeModel) -> None:
    """The head's own part of the logits, from the module's layers in float64."""
    row = made_up(model, 12, 1, texts=1)
    found = heads.copying(model, row).mean
    w, stream = model.weights(), model.capture(row, "blocks.1.hook_resid_post")[0].double()
    for layer in range(2):
        z = model.capture(row, f"blocks.{layer}.attn.hook_z")[0].double().view(13, 2, 8)
        for head in range(2):
            shares = []
            for dst in range(1, 12):
                out = z[dst, head] @ w.layers[layer].attn.W_O[head].double()
                normed = (out - out.mean()) * w.ln_final.norm.weight / stream[dst].std(unbiased=False)
                logits = (normed @ w.W_U.double())[row[0, 1:]]
                raised = (logits - logits.mean()).clamp_min(0)
                shares.append(float(raised[:dst].sum() / raised.sum()))
            assert float(found[layer, head]) == pytest.approx(2 * np.mean(shares) - 1, abs=1e-4)


def test_head_scores_work_for_a_model_whose_weights_are_not_known(tmp_path: Path, tiny_model_dir: Path) -> None:
    from test_circuits_parts import saved

    saved("llama", tmp_path / "llama", tiny_model_dir / "tokenizer.json")
    model = load_model(tmp_path / "llama")
    found = heads.prefix_matching(model, made_up(model, 7, 3)).values
    assert found.shape == (3, 2, 2)
    assert ((found > 0) & (found < 1)).all()
    assert heads.ablate_heads(model, made_up(model, 7, 2), "zero").second.shape == (3, 2, 2)


# --- growth ----------------------------------------------------------------------------------------------------------


def test_in_context_learning_is_late_minus_early_loss(model: NativeModel) -> None:
    tokens = torch.randint(300, (5, 32), generator=torch.Generator().manual_seed(0))
    losses = growth.context_losses(model, tokens, contexts_at_once=2)
    logits = model.logits(tokens)
    found = growth.in_context_learning(losses, growth.Window(11, 22))
    for i in range(5):
        each = [float(F.cross_entropy(logits[i, j - 1], tokens[i, j])) for j in range(1, 32)]
        late, early = (np.mean([each[j - 1] for j in range(at - 10, at + 10)]) for at in (22, 11))
        assert float(found[i]) == pytest.approx(late - early, abs=1e-4)
    with pytest.raises(ValueError, match="contexts of 32 tokens, too short"):
        growth.in_context_learning(losses)


def test_a_bigram_counts_as_seen_from_its_second_time_on() -> None:
    tokens = torch.randint(4, (30, 25), generator=torch.Generator().manual_seed(0))
    found = growth.bigram_seen_before(tokens)
    for row, seen in zip(tokens.tolist(), found.tolist(), strict=True):
        pairs = list(zip(row[:-1], row[1:], strict=True))
        assert seen == [pair in pairs[:i] for i, pair in enumerate(pairs)]
    before, after = torch.rand(30, 24), torch.rand(30, 24)
    gain = growth.gains(before, after, found)
    change = (after - before)[3]
    assert float(gain.seen_before[3]) == pytest.approx(float(change[found[3]].mean()), abs=1e-6)
    assert float(gain.others[3]) == pytest.approx(float(change[~found[3]].mean()), abs=1e-6)


def test_the_path_of_losses_is_numpys_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(6, 500, generator=generator) + torch.linspace(0, 3, 6)[:, None]
    found = growth.loss_path(losses)
    x = losses.double().numpy()
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    for component in range(2):
        largest = expected[np.abs(expected[:, component]).argmax(), component]
        assert np.allclose(found.points[:, component], expected[:, component] * np.sign(largest), atol=1e-8)
    assert np.allclose(found.explained, s[:2] ** 2 / (s**2).sum())
    shuffled = growth.shuffled_snapshots(losses, seed=1)
    assert torch.equal(shuffled.sort(0).values, losses.sort(0).values)
    assert growth.loss_path(shuffled).explained[0] < found.explained[0] / 1.5
    with pytest.raises(ValueError, match="needs at least 3"):
        growth.loss_path(losses[:2])
