"""The lenses as a user runs them, on a tiny model, on a dictionary, and on a GPT-2 of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from fakes import SHAPE, made_up_documents, random_sae, write_jsonl, write_model
from torch import Tensor

from sae import pipeline
from sae.circuits import world
from sae.circuits.circuit import Question, answer
from sae.circuits.known_facts import requests_of, variants
from sae.circuits.patching import PatchingError, activation_patching, runs_of
from sae.circuits.recall import held_out_facts, recall
from sae.circuits.results import read_result
from sae.circuits.sites import heads_of, stream_sites
from sae.circuits.tasks import facts, ioi, task_of
from sae.cli import main
from sae.dictionary.files import save
from sae.lm import LanguageModel, NativeModel, load_model
from sae.text.tokenizer import train_tokenizer

TWO = replace(SHAPE, n_layers=2)
HOOK = "blocks.0.mlp.hook_post"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    return NativeModel(write_model(tmp_path_factory.mktemp("two"), shape=TWO), "two-layers")


@pytest.fixture(scope="module")
def dictionary(model: NativeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dictionary of the model's neurons."""
    directory = tmp_path_factory.mktemp("dictionary") / "sae"
    identity = model.identity() | {"id": str(model.directory)}
    config = {"kind": "sae", "format": 1, "hook_point": HOOK, "model": identity, "activation": "relu"}
    save(random_sae(SHAPE.d_mlp, HOOK), directory, config)
    return directory


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, model: NativeModel) -> LanguageModel:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    made = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, initializer_range=0.3, **sizes))  # type: ignore[arg-type]
    made.save_pretrained(directory)
    path = str(model.directory / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=path, bos_token="<|endoftext|>").save_pretrained(directory)
    return load_model(directory)


@pytest.mark.parametrize(
    "asked",
    [
        Question(),
        Question(method="gradient"),
        Question(by="head", layer=1),
        Question(by="neuron", layer=0),
        Question(by="head", method="path", layer=1),
        Question(by="head", method="judge"),
    ],
    ids=lambda asked: f"{asked.method}-{asked.by}",
)
@pytest.mark.parametrize("which", ["model", "gpt2"])
def test_every_question_has_an_answer_with_controls(
    which: str, asked: Question, request: pytest.FixtureRequest
) -> None:
    """On native models and through TransformerLens; a grid has the shape of its labels."""
    lm: LanguageModel = request.getfixturevalue(which)
    task = task_of(lm, "induction", 4)
    measures, labels = answer(lm, task, asked)
    assert measures
    for name, measure in measures.items():
        assert measure.controls
        if isinstance(measure.value, Tensor):
            assert torch.isfinite(measure.value).all()
            for axis, size in zip(measure.axes, measure.value.shape, strict=True):
                known = labels.get(f"{axis}.{name}", labels.get(axis))
                assert known is None or len(known) == size, (name, axis)


def test_identities_hold_in_a_model_through_transformer_lens(gpt2: LanguageModel) -> None:
    task = task_of(gpt2, "induction", 4)
    sites = [*stream_sites(gpt2), *heads_of(gpt2, range(2))]
    runs = runs_of(gpt2, task, [site.hook_point for site in sites])
    found = activation_patching(runs, sites, [None], "restoring")
    assert (found.controls["identity"].value == 0).all()  # type: ignore[union-attr]
    assert found.value[:3, 0].tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    both = {site.hook_point: (lambda x, name=site.hook_point: runs.clean[name]) for site in stream_sites(gpt2)}
    assert torch.allclose(runs.ld("restoring", both), runs.ld_clean, atol=1e-4)


def test_queries_and_keys_of_a_head_decide_its_pattern_in_gpt2(gpt2: LanguageModel) -> None:
    """With clean q, k and v of the whole layer, its heads write what they write in the clean run."""
    task = task_of(gpt2, "induction", 4)
    names = [f"blocks.1.attn.hook_{part}" for part in "qkvz"]
    runs = runs_of(gpt2, task, names)
    seen: dict[str, Tensor] = {}

    def see(x: Tensor) -> Tensor:
        seen["z"] = x
        return x

    clean = {name: (lambda x, name=name: runs.clean[name]) for name in names[:3]}
    gpt2.edited_logits(task.corrupt, {**clean, names[3]: see})
    assert torch.allclose(seen["z"], runs.clean[names[3]], atol=1e-5)


def test_a_question_that_has_no_answer_is_refused(model: NativeModel) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"by": "x"}, "--by must be one of position"),
        ({"by": "feature"}, "needs a dictionary"),
        ({"by": "neuron", "method": "judge"}, "--method judge goes --by head"),
    ]
    for settings, message in wrong:
        with pytest.raises(PatchingError, match=message):
            Question(**settings)
    with pytest.raises(PatchingError, match="--layer 7 does not exist"):
        answer(model, task_of(model, "induction", 2), Question(by="head", layer=7))


def test_the_verb_patches_features_and_puts_the_result_beside_the_dictionary(
    dictionary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lens", "circuit", str(dictionary), "--by", "feature", "--n", "4"]) == 0
    assert "random_direction" in capsys.readouterr().out
    found = read_result(dictionary / "lenses" / "circuit-induction-activation-feature.json")
    first = found.measures["restoring_feature.first_order"]
    assert first.axes == ("feature",)
    assert first.value.shape == (24,)  # type: ignore[union-attr]
    assert len(found.labels["site.restoring_feature"]) == 24
    path = pipeline.lens("circuit", dictionary, by="feature", method="path", n=4)
    assert read_result(path).measures["into_k"].value.shape == (24, 4)  # type: ignore[union-attr]


def test_the_first_prompts_of_a_result_end_where_they_are_asked(model: NativeModel, tmp_path: Path) -> None:
    """The first prompt is shorter than the second, and what fills it up is not shown."""
    pairs = [("a b", "c b"), ("a b d e f g", "c b d e f g")]
    lines = [{"clean": clean, "corrupt": corrupt, "answer": "a", "wrong": "c"} for clean, corrupt in pairs]
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = pipeline.lens("circuit", model, out=tmp_path, task=str(file), by="head")
    assert [text.partition("<|endoftext|>")[2] for text in read_result(path).labels["first_prompts"]] == ["a b", "c b"]


def test_the_verb_erases_a_domain(dictionary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("concept_erasure", reason="the optional package concept-erasure is not installed")
    text = write_jsonl(tmp_path / "text.jsonl", made_up_documents(1500))
    arguments = ["lens", "erase", str(dictionary), "--text", str(text), "--n", "60"]
    assert main([*arguments, "--concept", "dna"]) == 0
    found = read_result(dictionary / "lenses" / "erase-dna.json")
    accuracy = found.measures["probe_accuracy"]
    assert float(accuracy.controls["before"].value) > 0.7
    assert abs(float(accuracy.value) - 0.5) < 0.1
    assert accuracy.controls.keys() == {"before", "random_subspace", "features_1", "features_10"}
    assert found.arrays["projection"].shape == (SHAPE.d_mlp, SHAPE.d_mlp)
    assert main([*arguments, "--concept", "poetry"]) == 2
    assert "the text has no domain 'poetry'; it has dna, numbers, prose" in capsys.readouterr().err


def test_a_model_that_does_not_know_the_world_is_refused(
    model: NativeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lens", "facts", str(model.directory), "--out", str(tmp_path)]) == 2
    assert "facts: of 900 facts, 0 have an object that is one token of" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def worldly(tmp_path_factory: pytest.TempPathFactory) -> tuple[NativeModel, list[str]]:
    """A model of random weights whose tokenizer is that of the made-up world, and the world's text."""
    texts = [document.text for document in world.documents(8000)]
    model = NativeModel(write_model(tmp_path_factory.mktemp("world"), shape=replace(SHAPE, d_vocab=841)), "world")
    model.tokenizer = train_tokenizer(texts, 841)
    return model, texts


def test_the_text_of_the_made_up_world_says_what_its_facts_are(worldly: tuple[NativeModel, list[str]]) -> None:
    _, texts = worldly
    facts_said = 0
    for text in texts[:300]:
        told = [key for key in world.FACTS if any(world.fact_prompt(*key, way).strip() in text for way in range(2))]
        for key in told:
            assert text.split()[-2:] == [world.FACTS[key], "."]
            facts_said += 1
    assert facts_said > 100


def test_the_prompts_of_ioi_and_facts_are_in_the_words_of_the_world(worldly: tuple[NativeModel, list[str]]) -> None:
    model, _ = worldly
    for pair in ioi(model, 20, Random(0)):
        assert pair.clean[pair.positions["s1"]] == pair.clean[pair.positions["s2"]] == pair.answers[1]
        assert pair.clean[pair.positions["io"]] == pair.corrupt[pair.positions["s2"]] == pair.answers[0]
    for pair in facts(model, 20, Random(0)):
        first, last = pair.positions["subject_first"], pair.positions["subject_last"]
        name = model.tokenizer.decode(pair.clean[first : last + 1]).strip()
        answers = {model.tokenizer.encode(f" {world.FACTS[name, r]}").ids[-1] for r in world.RELATIONS}
        assert pair.answers[0] in answers


def test_recall_asks_for_what_no_training_text_says_and_counts_right_answers(
    worldly: tuple[NativeModel, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that looks answers up in the world gets all of them, and its facts are never the control's."""
    model, _ = worldly
    trained = {document.text for document in world.documents(30_000) if document.split == "train"}
    held_out = {document.text for document in world.documents(30_000) if document.split == "heldout"}
    asked = [each for paraphrase in (0, 1) for each in held_out_facts(world.FACTS, paraphrase, Random(0))]
    said = {f"{each.prompt} {each.answer} ." for each in asked}
    assert not said & trained
    assert {text for text in held_out if any(name in text for name in world.SUBJECT_NAMES)} <= said
    assert 0.04 < len(asked) / (len(world.FACTS) * len(world.PREFIXES) * 2) < 0.06

    def looked_up(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 841)
        for row, ids in enumerate(tokens.tolist()):
            for end in range(4, len(ids) + 1):
                text = model.tokenizer.decode(ids[1:end])
                told = [key for key in world.FACTS if any(text.endswith(world.fact_prompt(*key, w)) for w in (0, 1))]
                word = world.FACTS[told[0]] if told else _receiver(text)
                logits[row, end - 1, model.tokenizer.encode(f" {word}").ids[0]] = 1.0
        return logits

    monkeypatch.setattr(model, "logits", looked_up)
    measures, labels = recall(model, 20)
    facts_recalled, given = measures["facts_recalled"], measures["ioi_recalled"]
    assert facts_recalled.value.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    assert facts_recalled.controls["other_answer"].value.tolist() == [0.0, 0.0]  # type: ignore[union-attr]
    assert given.value.tolist() == [1.0] * 3  # type: ignore[union-attr]
    control = given.controls["other_answer"].value
    assert 0.2 < float(control.mean()) < 0.8  # type: ignore[union-attr]
    assert labels["paraphrase"] == ["… works as a", "the job of … is"]


def _receiver(text: str) -> str:
    """The first of two people who is not the giver."""
    named = [word for word in text.split() if word in world.NAMES]
    return next((name for name in named[:2] if len(named) > 2 and name != named[2]), "the")


def test_a_request_asks_about_the_fact_its_neighbours_and_the_subject(worldly: tuple[NativeModel, list[str]]) -> None:
    model, _ = worldly
    for request in requests_of(model, 3):
        for prompt, end in zip(request.prompts, request.subjects, strict=True):
            before = model.tokenizer.decode(prompt[1 : end + 1])
            assert any(before.endswith(name) for name in world.SUBJECT_NAMES)
        assert request.old != request.new
        assert len(request.other_relations) == 2
        assert all(question.prompt != request.prompts[0] for question in request.neighbours)
    assert list(variants(1, 4)[0]) == ["edited", "identity", "wrong_layer", "wrong_token"]
    assert variants(1, 4)[0]["wrong_layer"].layer == 3
