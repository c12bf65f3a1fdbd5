"""The lenses `heads` and `growth`: every measure has its controls, and a circuit set by hand stands out from them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fakes import SHAPE, made_up_documents, text_source, write_model
from test_circuits_heads import induction  # noqa: F401
from test_circuits_parts import saved

from sae import pipeline
from sae.analysis.untrained import matrices_shuffled, weights_initialised
from sae.circuits import weights
from sae.circuits.growth_measures import Snapshot, growth_measures, unordered, window_for
from sae.circuits.head_measures import Texts, head_measures
from sae.circuits.results import Result, read_result, write_result
from sae.cli.lens_table import lens_table
from sae.lm import LanguageModel, NativeModel, load_model
from sae.lm.pretrain import pretrain
from sae.lm.pretrain_config import PretrainConfig
from sae.lm.transformer import TransformerConfig

ATTN = replace(SHAPE, n_layers=2, attn_only=True)


def texts(seed: int = 0, *, contexts: int = 8, width: int = 32) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    held_out, counted = (torch.randint(1, 300, (n, width), generator=generator) for n in (contexts, 10 * contexts))
    return Texts(held_out, counted)


def test_a_circuit_set_by_hand_stands_out_from_its_controls(
    induction: NativeModel,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_pairs = partial(weights.random_composition, n=2)  # heads of 300 dimensions: most of the time is theirs
    monkeypatch.setattr(weights, "random_composition", few_pairs)
    found, labels = head_measures(induction, texts(contexts=4), made_up=2)
    prefix = found["prefix_matching"]
    assert prefix.value[1, 0] > 0.99
    for control in prefix.controls.values():
        assert control.value.max() < 0.2
    assert found["ov_eigenvalues"].value[1, 0] > 0.99
    assert abs(found["ov_eigenvalues"].controls["initialised"].value).max() < 0.1
    assert found["k_composed_eigenvalues"].value[0, 2] > 0.99
    assert found["ablation_zero"].value[0, 0] > 3
    assert found["repeat_loss"].value < 0.1
    assert found["repeat_loss"].controls["first_copy"].value > 3
    assert found["repeat_loss"].controls["shuffled_weights"].value > 3
    assert labels["left_out"] == {}
    path = write_result(Result("heads", found, {}, labels=labels), tmp_path)
    assert read_result(path).measures["prefix_matching"].controls.keys() == prefix.controls.keys()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_of_hugging_face_models(family: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    saved(family, tmp_path / family, tiny_model_dir / "tokenizer.json")
    model = load_model(tmp_path / family)
    before = {name: p.clone() for name, p in model.module.named_parameters()}  # type: ignore[attr-defined]
    found, labels = head_measures(model, texts(), made_up=2)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())  # type: ignore[attr-defined]
    assert found["prefix_matching"].value.shape == (2, 2)
    for measure in found.values():
        assert {"shuffled_weights", "initialised"} <= measure.controls.keys()
    if family == "llama":
        assert "LlamaForCausalLM" in labels["left_out"]["weights"]
        assert "ov_eigenvalues" not in found
    else:
        assert "has MLPs" in labels["left_out"]["order_terms"]
        assert found["ov_eigenvalues"].value.shape == (2, 2)
        assert found["k_composition"].value.shape == (4, 4)
        assert len(labels["skip_trigrams"]) == 2


@pytest.mark.parametrize("change", [matrices_shuffled, weights_initialised])
def test_untrained_weights_are_restored(tiny_model: NativeModel, change: object) -> None:
    before = {name: p.clone() for name, p in tiny_model.module.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), change(tiny_model, 1):  # type: ignore[operator]  # noqa: PT012
        parameters = dict(tiny_model.module.named_parameters())
        W = parameters["embed.weight"]
        assert not torch.equal(W, before["embed.weight"])
        if change is weights_initialised:
            assert float(W.std()) == pytest.approx(0.02, rel=0.05)
            assert parameters["ln_final.weight"].unique().tolist() == [1]
            assert parameters["ln_final.bias"].unique().tolist() == [0]
        else:
            assert torch.equal(W.flatten().sort().values, before["embed.weight"].flatten().sort().values)
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.module.named_parameters())


# --- growth ----------------------------------------------------------------------------------------------------------


def test_growth_from_random_to_an_induction_circuit(induction: NativeModel) -> None:  # noqa: F811
    """The last of three snapshots is the circuit set by hand, the others are that model before any training."""
    contexts = torch.randint(1, 300, (12, 31), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    contexts = torch.cat([torch.zeros(12, 1, dtype=torch.long), contexts], 1)[:, :62]

    def untrained(seed: int) -> LanguageModel:
        model = NativeModel(induction.directory, f"untrained {seed}")
        with weights_initialised(model, seed):
            state = {name: value.clone() for name, value in model.module.state_dict().items()}
        model.module.load_state_dict(state)
        return model

    snapshots = [Snapshot(0, lambda: untrained(0)), Snapshot(10, lambda: untrained(1)), Snapshot(20, lambda: induction)]
    found, labels = growth_measures(snapshots, contexts, made_up=3)
    assert labels["tokens"] == [0, 10, 20]
    assert labels["largest_growth_between"] == [10, 20]
    learned = found["in_context_learning"]
    assert learned.value[2] < -2
    assert abs(learned.value[:2]).max() < 0.1
    assert learned.controls["random_order"].value[2] > learned.value[2] + 1
    assert found["prefix_matching"].value[2] > 0.99
    assert found["prefix_matching"].controls["no_repeats"].value.max() < 0.2
    assert found["gain_seen_before"].value[1] < found["gain_others"].value[1] - 2
    assert found["loss_path"].value.shape == (3, 2)
    assert all(measure.controls for measure in found.values())
    with pytest.raises(ValueError, match="at least 3 are needed"):
        growth_measures(snapshots[:2], contexts)


def test_windows_fit_the_context() -> None:
    assert window_for(256) == (50, 244)
    assert window_for(62) == (12, 52)
    tokens = torch.arange(40).view(2, 20)
    mixed = unordered(tokens, 0)
    assert torch.equal(mixed[:, 0], tokens[:, 0])
    assert torch.equal(mixed.sort(1).values, tokens)
    assert not torch.equal(mixed, tokens)


def test_the_lenses_write_their_results(tmp_path: Path) -> None:
    source = text_source(made_up_documents(600))
    shape = TransformerConfig(d_model=16, n_heads=2, d_head=8, n_layers=2, n_ctx=32, d_vocab=300, attn_only=True)
    config = PretrainConfig(train_tokens=1024, batch_contexts=4, keep_at=(0, 512, 1024), repeat_share=0.5)
    out = pretrain(source, tmp_path / "lm", shape=shape, config=config)
    path = pipeline.lens("growth", out, text=source, n=6, out=tmp_path / "results")
    grown = read_result(path)
    assert grown.labels["tokens"] == [0, 512, 1024]
    assert all(name in lens_table(grown) for name in grown.measures)
    path = pipeline.lens("heads", out, text=source, n=6, out=tmp_path / "results")
    found = read_result(path)
    assert found.measures["ov_eigenvalues"].value.shape == (2, 2)
    assert isinstance(found.measures["repeat_loss"].value, float)
    shown = lens_table(found)
    assert all(name in shown for name in found.measures)
    with pytest.raises(pipeline.PipelineError, match="no snapshots"):
        pipeline.lens("growth", write_model(tmp_path / "bare", shape=ATTN), text=source, out=tmp_path / "results")
