"""Logit lens and tuned lens against formulas in float64, and the whole of `sae lens depth`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import SHAPE, made_up_documents, random_sae, text_source, write_model
from torch.nn import functional as F

from sae import pipeline
from sae.circuits.depth import Translator, Tuning, feature_depth, layer_depth
from sae.circuits.prompt_depth import read_prompt
from sae.circuits.results import read_result
from sae.circuits.text import Contexts, contexts_of
from sae.circuits.unembedding import unembedding_of
from sae.cli import main
from sae.lm import NativeModel
from sae.lm.transformer import TransformerConfig
from sae.pipeline.errors import PipelineError
from store.common import HELD_OUT, TRAIN

TWO_LAYERS = TransformerConfig(**{**SHAPE.to_dict(), "n_layers": 2})
TUNING = Tuning(steps=60, batch_tokens=64, lr=1e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    return NativeModel(write_model(tmp_path_factory.mktemp("two"), shape=TWO_LAYERS), "two-layers")


def some(model: NativeModel, split: str, n: int = 12) -> Contexts:
    return contexts_of(model, text_source(made_up_documents(400)), split, n)


def test_contexts_are_of_one_split_and_say_what_they_are(model: NativeModel) -> None:
    held_out, train = some(model, HELD_OUT), some(model, TRAIN)
    assert held_out.tokens.shape == (12, SHAPE.n_ctx)
    assert set(held_out.domains) <= {"prose", "dna", "numbers"}
    assert torch.equal(held_out.keep, held_out.tokens != model.bos_id)
    texts = {d.text for d in made_up_documents(400) if d.split == HELD_OUT}
    first = model.tokenizer.decode(held_out.tokens[0].tolist())
    assert any(first.removeprefix("<|endoftext|>").strip()[:20] in text for text in texts)
    assert not torch.equal(held_out.tokens, train.tokens)


def test_the_unembedding_is_that_of_the_model(model: NativeModel) -> None:
    tokens = some(model, HELD_OUT).tokens
    unembedding = unembedding_of(model, tokens)
    resid = model.capture(tokens, "blocks.1.hook_resid_post")
    assert torch.allclose(unembedding.logits(resid), model.logits(tokens), atol=1e-4)
    through_bridge = unembedding.logits(model.capture(tokens, "blocks.0.hook_resid_post"))
    earlier = model.module.unembed(model.module.ln_final(model.capture(tokens, "blocks.0.hook_resid_post")))
    assert torch.allclose(through_bridge, earlier, atol=1e-4)


def test_kl_and_rank_are_those_of_the_formula(model: NativeModel) -> None:
    held_out = some(model, HELD_OUT)
    measures, readings = layer_depth(model, some(model, TRAIN, 24), held_out, TUNING)
    module, here = model.module.double(), held_out.predicted
    try:
        logits = module(held_out.tokens)[here].log_softmax(-1)
        truth = held_out.tokens[:, 1:][here[:, :-1]]
        streams = {}

        def keep(name: str, value: torch.Tensor) -> torch.Tensor:
            streams[name] = value
            return value

        module(held_out.tokens, keep)
        for depth, name in enumerate(readings.names):
            lens = module.unembed(module.ln_final(streams[name]))[here].log_softmax(-1)
            kl = F.kl_div(lens, logits, log_target=True, reduction="none").sum(-1)
            rank = torch.tensor([int((row > row[t]).sum()) for row, t in zip(lens, truth, strict=True)])
            assert (readings.kl[:, depth] - kl).abs().max() < 1e-4
            assert ((readings.rank[:, depth] - rank) == 0).double().mean() > 0.999
            assert abs(measures["kl_logit_lens"].value[depth] - kl.mean()) < 1e-5
    finally:
        model.module.float()
    assert measures["kl_logit_lens"].n == len(truth)
    assert abs(measures["kl_logit_lens"].value[-1]) < 1e-6, "the last depth is the model"


def test_the_tuned_lens_is_below_the_logit_lens_and_its_bias_on_held_out_text(model: NativeModel) -> None:
    measures, _ = layer_depth(model, some(model, TRAIN, 48), some(model, HELD_OUT), TUNING)
    logit, tuned = measures["kl_logit_lens"], measures["kl_tuned_lens"]
    biased = tuned.controls["bias_only"].value
    assert (tuned.value[:-1] < biased[:-1]).all()
    assert (biased[:-1] < logit.value[:-1]).all()
    assert (logit.value[:-1] < logit.controls["shuffled_rows"].value[:-1]).all()


def test_of_each_feature_the_tokens_on_which_it_fires_count(model: NativeModel) -> None:
    held_out = some(model, HELD_OUT)
    _, readings = layer_depth(model, some(model, TRAIN), held_out, Tuning(steps=1, batch_tokens=8))
    hook_point = "blocks.0.mlp.hook_post"
    sae = random_sae(SHAPE.d_mlp, hook_point)
    with torch.no_grad():
        sae.b_enc[3] = -1e6  # never fires
        sae.b_enc[5] = 1e6  # always does
    found = feature_depth(model, sae, hook_point, held_out, readings)["kl_by_feature"]
    acts = sae.encode(model.capture(held_out.tokens, hook_point)[held_out.predicted])
    for feature in (0, 7):
        assert torch.allclose(found.value[feature], readings.kl[acts[:, feature] > 0].mean(0), atol=1e-4)
    assert found.value[3].isnan().all()
    assert torch.allclose(found.value[5], readings.kl.mean(0), atol=1e-4)
    assert torch.allclose(found.controls["shuffled_firings"].value[5], readings.kl.mean(0), atol=1e-4)


def test_the_verb_writes_a_result_for_a_model(
    model: NativeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fakes import write_jsonl

    monkeypatch.chdir(tmp_path)
    text = write_jsonl(tmp_path / "text.jsonl", made_up_documents(300))
    assert main(["lens", "depth", str(model.directory), "--text", str(text), "--n", "4"]) == 0
    shown = capsys.readouterr().out
    path = tmp_path / "runs" / "lenses" / model.directory.name / "depth.json"
    assert "kl_tuned_lens" in shown
    assert "bias_only" in shown
    assert read_result(path).measures.keys() == {f"{a}_{b}_lens" for a in ("kl", "rank") for b in ("logit", "tuned")}
    kept = read_result(path).arrays
    assert {name: list(array.shape) for name, array in kept.items()} == {
        "tuned_weight": [3, 16, 16],
        "tuned_bias": [3, 16],
    }
    assert kept["tuned_weight"][:2].abs().amax((1, 2)).min() > 0
    assert kept["tuned_weight"][2].abs().max() == 0  # the last depth is the model itself
    assert read_result(path).about["model"] == model.identity() | {"id": str(model.directory)}


def test_an_unknown_lens_or_setting_is_named(model: NativeModel) -> None:
    with pytest.raises(PipelineError, match="there is no lens 'x'; there are "):
        pipeline.lens("x", model)
    with pytest.raises(PipelineError, match="the lens depth has no setting 'layer'"):
        pipeline.lens("depth", model, layer=1)


def test_the_verb_knows_the_lenses_of_the_pipeline() -> None:
    from sae.cli.lens import NAMES
    from sae.pipeline.lenses import LENSES

    assert set(NAMES) == set(LENSES)


@pytest.mark.parametrize("tuned", [False, True])
def test_what_is_read_in_a_prompt_is_that_of_the_formula(model: NativeModel, tuned: bool) -> None:
    """Against float64, one pair of positions at a time; the control is the mean over all other positions."""
    ids = some(model, HELD_OUT).tokens[0, :7].tolist()
    generator = torch.Generator().manual_seed(0)
    maps = [Translator(*(torch.randn(s, generator=generator) * 0.1 for s in ((16, 16), (16,)))) for _ in range(3)]
    found = read_prompt(model, ids, maps if tuned else None)
    streams = [model.capture(torch.tensor([ids]), name)[0].double() for name in found.depths]
    module = model.module.double()
    try:
        final = module(torch.tensor([ids]))[0].log_softmax(-1).detach()
        for depth, stream in enumerate(streams):
            if tuned:
                stream = stream + stream @ maps[depth].weight.double() + maps[depth].bias.double()
            seen = module.unembed(module.ln_final(stream[None]))[0].log_softmax(-1).detach()
            assert found.token[depth].tolist() == seen.argmax(-1).tolist()
            assert torch.allclose(found.p[depth].double(), seen.exp().max(-1).values, atol=1e-5)
            kl = [[float(F.kl_div(q, p, log_target=True, reduction="sum")) for q in seen] for p in final]
            rank = [[float((q > q[i]).sum()) for q in seen] for i in ids[1:]]
            for here in range(len(ids)):
                others = [j for j in range(len(ids)) if j != here]
                assert float(found.kl[depth, here]) == pytest.approx(kl[here][here], abs=1e-4)
                assert float(found.kl_elsewhere[depth, here]) == pytest.approx(
                    sum(kl[here][j] for j in others) / len(others), rel=1e-4
                )
                if here + 1 == len(ids):  # nothing follows
                    assert found.rank[depth, here].isnan()
                    continue
                assert float(found.rank[depth, here]) == rank[here][here]
                assert float(found.rank_elsewhere[depth, here]) == pytest.approx(
                    sum(rank[here][j] for j in others) / len(others)
                )
                assert float(found.p_next[depth, here]) == pytest.approx(
                    float(seen[here, ids[here + 1]].exp()), rel=1e-3
                )
    finally:
        model.module.float()


def test_maps_of_another_model_are_refused(model: NativeModel) -> None:
    with pytest.raises(ValueError, match="maps of 2 depths; two-layers has 3"):
        read_prompt(model, [0, 1, 2], [Translator(torch.zeros(16, 16), torch.zeros(16))] * 2)
