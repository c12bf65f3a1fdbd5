"""Parts and readers against the models' own forward pass: the stream, logits, pre-activations, queries and keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import SHAPE, random_sae, write_model
from test_lm import FAMILIES
from torch import Tensor

from sae.circuits.parts import (
    Parts,
    Reader,
    contributions,
    feature_reader,
    head_reader,
    last_point,
    logit_reader,
    qk_scores,
    stream_parts,
    total,
)
from sae.lm import LanguageModel, ModelError, load_model

IDS = [0, 17, 203, 5, 17, 99, 250, 31, 17, 203]
TOKENS = torch.tensor([IDS])


def saved(family: str, directory: Path, tokenizer: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(5)
    plain = FAMILIES[family][0]().eval()
    with torch.no_grad():  # biases of fresh models are 0, and would hide
        for p in plain.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    plain.save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(directory)
    return plain


@pytest.fixture(scope="module", params=["relu", "attn_only", "solu", "gpt2"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> LanguageModel:
    directory = tmp_path_factory.mktemp("parts") / "model"
    if request.param == "gpt2":
        saved("gpt2", directory, tiny_model_dir / "tokenizer.json")
        return load_model(directory)
    changes: dict[str, dict[str, Any]] = {"relu": {}, "attn_only": {"attn_only": True}, "solu": {"act_fn": "solu_ln"}}
    return load_model(write_model(directory, shape=replace(SHAPE, n_layers=2, **changes[request.param])))


def points(model: LanguageModel) -> list[str]:
    names = ["hook_resid_pre", "hook_resid_post"]
    if model.weights().layers[0].mlp is not None:
        names.append("hook_resid_mid")
    return [f"blocks.{layer}.{name}" for layer in range(2) for name in names]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))


@pytest.mark.parametrize("neurons", [False, True])
def test_parts_sum_to_the_stream(model: LanguageModel, neurons: bool) -> None:
    """At every place of the stream, against what a hook sees there."""
    for point in points(model):
        parts = stream_parts(model, IDS, point=point, neurons=neurons)
        assert close(total(parts), model.capture(TOKENS, point)[0]), point
    names = [name for part in parts for name in part.names]
    assert len(set(names)) == len(names) == sum(len(part) for part in parts)
    assert {"embedding", "position", "L0.head.1", "L1.attention_bias"} <= set(names)


def test_each_head_and_neuron_of_the_last_layer_writes_what_is_missing_without_it(model: LanguageModel) -> None:
    """Its output set to 0 in the forward pass: what changes where the final norm reads (nothing comes in between)."""
    parts = {(part.kind, part.layer): part for part in stream_parts(model, IDS, neurons=True)}
    width = model.hook_width("blocks.1.attn.hook_z") // model.n_heads
    logits = model.weights().logits
    if ("neuron", 1) in parts:
        written, hook_point, columns = parts["neuron", 1].part(3), "blocks.1.mlp.hook_post", slice(3, 4)
    else:
        written, hook_point, columns = parts["head", 1].part(1), "blocks.1.attn.hook_z", slice(width, 2 * width)

    def drop(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., columns] = 0
        return x

    stream = model.capture(TOKENS, last_point(model))[0]
    assert close(logits(stream - written), model.logits(TOKENS, hook_point, drop)[0])
    assert not close(logits(stream), model.logits(TOKENS, hook_point, drop)[0], 1e-3)


@pytest.mark.parametrize(
    ("place", "replaced"),
    [
        ("0.attn.hook_z", {"head"}),
        ("0.hook_attn_out", {"head"}),
        ("0.mlp.hook_post", {"mlp"}),
        ("0.hook_mlp_out", {"mlp"}),
        ("0.hook_resid_mid", {"embedding", "position", "head"}),
        ("1.hook_resid_pre", {"embedding", "position", "head", "mlp"}),
    ],
)
def test_a_dictionary_stands_in_for_what_it_reconstructs(model: LanguageModel, place: str, replaced: set[str]) -> None:
    hook_point = f"blocks.{place}"
    if model.weights().layers[0].mlp is None and ("mlp" in place or "mid" in place):
        pytest.skip("no MLP")
    sae = random_sae(model.hook_width(hook_point), hook_point)
    parts = stream_parts(model, IDS, dictionaries={hook_point: sae})
    assert close(total(parts), model.capture(TOKENS, last_point(model))[0])
    features = next(part for part in parts if part.kind == "feature")
    assert features.acts is not None
    assert torch.equal(features.acts, sae.encode(model.capture(TOKENS, hook_point)[0]))
    before = {part.kind for part in parts if part.layer != 1 or part.kind in ("feature", "error")}
    assert not before & replaced
    assert before >= {"embedding", "position", "head", "feature", "error"} - replaced


def test_held_contributions_sum_to_the_logits_of_the_model(model: LanguageModel) -> None:
    parts = stream_parts(model, IDS, neurons=True)
    logits = model.logits(TOKENS)[0]
    pair = contributions(parts, logit_reader(model, 7, 200))
    assert close(pair.reading[:, 0], logits[:, 7] - logits[:, 200])
    assert close(pair.values.sum(0) + pair.constant, pair.reading)
    alone = contributions(parts, logit_reader(model, 7))
    assert close(alone.reading[:, 0], logits[:, 7] - logits.mean(-1))
    assert close(alone.values.sum(0) + alone.constant, alone.reading)


def test_recomputed_contributions_are_those_of_the_norm_without_the_part(model: LanguageModel) -> None:
    """torch's own layer_norm on the stream without one part."""
    parts = stream_parts(model, IDS)
    found = contributions(parts, logit_reader(model, 7, 200), norm_scale="recomputed")
    weights, stream = model.weights(), model.capture(TOKENS, last_point(model))[0]
    norm = weights.ln_final
    place = found.names.index("L0.head.1")
    head = next(part for part in parts if part.kind == "head").part(1)

    def logit(x: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], norm.norm.weight, norm.bias, norm.norm.eps)
        values = normed @ weights.W_U + weights.b_U
        return values[:, 7] - values[:, 200]

    assert close(found.values[place, :, 0], logit(stream) - logit(stream - head), 1e-4)
    assert not close(found.values.sum(0) + found.constant, found.reading, 1e-3)  # and it says so
    assert found.norm_scale == "recomputed"


def test_a_features_pre_activation_is_a_sum_over_parts(model: LanguageModel) -> None:
    for place in ("hook_resid_post", "mlp.hook_in"):
        hook_point = f"blocks.1.{place}"
        if place == "mlp.hook_in" and model.weights().layers[0].mlp is None:
            continue
        sae = random_sae(16, hook_point)
        reader = feature_reader(model, sae, 5, hook_point)
        found = contributions(stream_parts(model, IDS, point=reader.point), reader)
        assert close(found.reading[:, 0], sae.pre_acts(model.capture(TOKENS, hook_point)[0])[:, 5])
        assert close(found.values.sum(0) + found.constant, found.reading)


def test_attention_scores_split_over_queries_and_keys(model: LanguageModel) -> None:
    """The softmax of the scores that the parts sum to is the model's own pattern."""
    for layer, head in ((0, 1), (1, 0)):
        q, k = (head_reader(model, layer, head, which) for which in ("q", "k"))  # type: ignore[arg-type]
        parts = stream_parts(model, IDS, point=q.point)
        queries, keys = contributions(parts, q), contributions(parts, k)
        scores = torch.stack([qk_scores(queries, keys, dst=9, src=src).sum() for src in range(10)])
        assert close(scores.softmax(0), model.attention(TOKENS, layer).pattern[head, 9])
        shape = qk_scores(queries, keys, dst=9, src=0).shape
        assert shape == (len(queries.names) + 1, len(queries.names) + 1)
        v = contributions(parts, head_reader(model, layer, head, "v"))
        assert close(v.reading, model.attention(TOKENS, layer).values[:, head])
    with pytest.raises(ValueError, match="norm scales held"):
        qk_scores(queries, contributions(parts, k, norm_scale="recomputed"), dst=1, src=0)


def test_refusals_say_what_is_possible(model: LanguageModel) -> None:
    with pytest.raises(ModelError, match="no place of the residual stream"):
        stream_parts(model, IDS, point="blocks.0.attn.hook_z")
    with pytest.raises(ModelError, match="no place of the residual stream"):
        stream_parts(model, IDS, point="blocks.2.hook_resid_pre")
    with pytest.raises(ValueError, match=r"head 1\.9 does not exist"):
        head_reader(model, 1, 9, "q")
    with pytest.raises(ValueError, match="token 300 is outside"):
        logit_reader(model, 300)
    with pytest.raises(ValueError, match="does not come before"):
        stream_parts(
            model, IDS, point="blocks.0.hook_resid_pre", dictionaries={"blocks.1.hook_attn_out": random_sae(16)}
        )
    with pytest.raises(ValueError, match="does not read the residual stream"):
        feature_reader(model, random_sae(16), 0, "blocks.0.hook_attn_out")


def test_families_that_are_not_exact_are_refused_by_name(tmp_path: Path, tiny_model_dir: Path) -> None:
    saved("llama", tmp_path / "llama", tiny_model_dir / "tokenizer.json")
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        stream_parts(load_model(tmp_path / "llama"), IDS)


def test_a_forward_pass_that_the_weights_do_not_explain_is_refused(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPT-2 whose attention is scaled by its layer number is no GPT-2 to the weights, whatever it is called."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
    config = GPT2Config(**sizes, eos_token_id=0, initializer_range=0.5, scale_attn_by_inverse_layer_idx=True)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "scaled")
    PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_model_dir / "tokenizer.json"), bos_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "scaled")
    with pytest.raises(ModelError, match="the attention pattern of layer 1 does not follow from the weights"):
        load_model(tmp_path / "scaled").weights()


def test_parts_in_two_forms_agree() -> None:
    acts, directions = torch.randn(6, 3), torch.randn(3, 5)
    scaled = Parts("neuron", 0, None, acts, directions)
    dense = Parts("neuron", 0, torch.einsum("pn,nm->npm", acts, directions))
    matrix = torch.randn(5, 2)
    assert torch.allclose(scaled.total(), dense.total(), atol=1e-6)
    assert torch.allclose(scaled.part(2), dense.part(2))
    assert torch.allclose(scaled.times(matrix), dense.times(matrix), atol=1e-6)
    reader = Reader("r", "blocks.0.hook_resid_pre", matrix, torch.ones(2))
    assert torch.allclose(reader.read(torch.zeros(5)), torch.ones(2))
