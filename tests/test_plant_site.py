"""Planting the site of facts: interchange in a memory that was set by hand, and the script from end to end."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fakes import SHAPE, write_model
from memory_model import OBJECTS, SUBJECTS, WORDS, memory_model, object_of

from sae.circuits import world
from sae.circuits.world import PREFIXES, as_document, fact_prompt
from sae.lm import NativeModel, load_model
from sae.text.tokenizer import train_tokenizer
from store.common import HELD_OUT, TRAIN

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("plant_site")


@pytest.fixture(scope="module")
def worldly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and a tokenizer that has the world's words."""
    directory = write_model(tmp_path_factory.mktemp("worldly"), shape=replace(SHAPE, n_layers=2, d_vocab=840, n_ctx=48))
    texts = (document.text for document in world.documents(4000))
    train_tokenizer(texts, 840).save(str(directory / "tokenizer.json"))
    return directory


def test_interchange_in_the_memory_answers_about_the_other_subject_at_the_site_alone(
    plant: ModuleType, tmp_path: Path
) -> None:
    """Layer 0's MLP at the subject is the memory, so what is put there decides; layer 1's is read by nobody."""
    model = memory_model(tmp_path / "memory").module
    n = len(SUBJECTS)
    tokens = torch.tensor([[0, WORDS[0], subject, WORDS[1], WORDS[2]] for subject in SUBJECTS])
    answers = torch.tensor([[object_of(subject)] for subject in SUBJECTS])
    each, relations = torch.arange(n), torch.zeros(n, dtype=torch.long)
    questions = plant.Questions(tokens, torch.full((n,), 2), torch.full((n,), 4), each, relations, answers)
    assert len(set(OBJECTS)) == n, "no other subject has the same answer"
    with torch.no_grad():
        found = {layer: plant.interchange_loss(model, questions, each, layer, False)[1] for layer in (0, 1)}
        twin = plant.interchange_loss(model, questions, each, 0, True)[1]
    assert found == {0: 1.0, 1: 0.0}
    assert twin == 1.0


def test_questions_are_of_the_world_and_none_is_held_out(plant: ModuleType, worldly: Path) -> None:
    lm = NativeModel(worldly, "m")
    questions = plant.questions_of(lm)
    told = set()
    for (subject, relation), word in world.FACTS.items():
        for prompt in (fact_prompt(subject, relation, way, prefix) for way in (0, 1) for prefix in PREFIXES):
            if as_document(f"{prompt} {word}").split == TRAIN:
                told.add((prompt, word))
            else:
                assert as_document(f"{prompt} {word}").split == HELD_OUT
    found = set()
    for row, end, subject_end, who, what in zip(
        questions.tokens, questions.ends, questions.subject_ends, questions.subjects, questions.relations, strict=True
    ):
        prompt = lm.tokenizer.decode(row[1 : end + 1].tolist())
        answer = lm.tokenizer.decode([int(questions.answers[who, what])]).strip()
        found.add((prompt, answer))
        name = lm.tokenizer.decode(row[1 : subject_end + 1].tolist()).split()[-2:]
        assert " ".join(name) in world.SUBJECT_NAMES
    assert found <= told
    assert len(found) > 0.9 * len(told), "the rest have objects of more than one token"


def test_the_script_writes_a_model_that_opens(
    plant: ModuleType,
    worldly: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = load_model(worldly)
    for name, more in (("planted", []), ("twin", ["--twin"])):
        flags = f"--out {tmp_path / name} --layer 0 --steps 3 --batch 16".split()
        monkeypatch.setattr(sys, "argv", ["plant_site.py", str(worldly), *flags, *more])
        plant.main()
        assert "right in the last 3 steps" in capsys.readouterr().out
    planted, twin = (load_model(tmp_path / name) for name in ("planted", "twin"))
    assert len({lm.weights_sha256 for lm in (before, planted, twin)}) == 3
    assert planted.tokenizer.to_str() == before.tokenizer.to_str()
