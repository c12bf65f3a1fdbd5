"""Causal tracing and ROME on a memory set by hand, where the place of each fact is known."""

from __future__ import annotations

import pytest
import torch
from memory_model import OBJECTS, SUBJECTS, WORDS, memory_model, object_of
from torch import Tensor

from sae.circuits.rome import Question, RankOne, Request, Variant, rank_one, rome, scores, second_moment
from sae.circuits.tasks import Pair, Task, _padded
from sae.circuits.tracing import causal_tracing
from sae.lm import NativeModel

A, B, C, D = WORDS
SUBJECT_AT = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    return memory_model(tmp_path_factory.mktemp("memory"))


def prompt(subject: int, *, words: tuple[int, int, int] = (A, B, C)) -> list[int]:
    return [0, words[0], subject, *words[1:]]


@pytest.fixture(scope="module")
def task(model: NativeModel) -> Task:
    pairs = []
    for subject, other in zip(SUBJECTS, [*SUBJECTS[1:], SUBJECTS[0]], strict=True):
        places = {"word": 1, "subject_last": SUBJECT_AT, "after": 3}
        pairs.append(Pair(prompt(subject), prompt(other), (object_of(subject), object_of(other)), places))
    return _padded("memory", pairs, model)


def requests() -> list[Request]:
    found = []
    for subject, other in zip(SUBJECTS, [*SUBJECTS[3:], *SUBJECTS[:3]], strict=True):
        found.append(
            Request(
                [prompt(subject), prompt(subject, words=(B, B, C)), prompt(subject, words=(D, B, C))],
                [SUBJECT_AT] * 3,
                object_of(subject),
                object_of(other),
                [prompt(subject, words=(A, C, D)), prompt(subject, words=(D, C, A))],
                [Question(prompt(s), object_of(s)) for s in SUBJECTS if s != subject],
                [],
            )
        )
    return found


def moment(model: NativeModel, layer: int) -> Tensor:
    return second_moment(model, torch.tensor([prompt(s, words=(w, B, C)) for s in SUBJECTS for w in WORDS]), layer)


def test_the_memory_answers(model: NativeModel, task: Task) -> None:
    best = model.logits(task.clean)[:, -1].argmax(-1)
    assert best.tolist() == [object_of(s) for s in SUBJECTS]


def test_tracing_with_another_subject_finds_the_site_and_nothing_else(model: NativeModel, task: Task) -> None:
    measures, labels = causal_tracing(model, task, "swap")
    assert labels["place"] == ["word", "subject_last", "after", "end", "subject"]
    total = float(measures["total_effect"].value)
    assert total > 0.99
    mlp, resid, attn = (measures[f"restored_{kind}"].value for kind in ("mlp_out", "resid_post", "attn_out"))
    assert mlp[0, 1] == pytest.approx(total, abs=0.01), "layer 0's MLP at the subject restores the fact"
    assert resid[0, 1] == pytest.approx(total, abs=0.01)
    assert attn[1, 3] == pytest.approx(total, abs=0.01), "layer 1's attention brings it to the end"
    assert torch.equal(mlp[:, 4], mlp[:, 1]), "the subject is one token"
    for grid, known in ((mlp, (0, 1)), (attn, (1, 3))):
        others = grid[:, :4].clone()
        others[known] = 0
        assert others.abs().max() < 0.01
    control = measures["restored_mlp_out"].controls["random_direction"].value
    assert control.abs().max() < 0.5  # type: ignore[union-attr]
    assert abs(float(measures["total_effect"].controls["other_tokens"].value)) < total


def test_tracing_with_noise_finds_the_same_site(model: NativeModel, task: Task) -> None:
    measures, _ = causal_tracing(model, task, "gaussian")
    assert float(measures["total_effect"].value) > 0.3
    for kind, known in (("mlp_out", (0, 1)), ("attn_out", (1, 3))):
        grid = measures[f"restored_{kind}"].value[:, :4]  # type: ignore[index]
        assert divmod(int(grid.argmax()), grid.shape[1]) == known


def test_the_edit_is_the_change_of_the_weights(model: NativeModel) -> None:
    """`y → y + (k · u) Λ` gives the logits of a model whose W_out is W_out + Λ uᵀ."""
    edit = RankOne(0, torch.linspace(-1, 1, 13), torch.linspace(-0.3, 0.3, model.module.config.d_model))
    tokens = torch.tensor([prompt(s) for s in SUBJECTS])
    found = model.edited_logits(tokens, edit.splices())
    weight = model.module.blocks[0].mlp.out.weight
    kept = weight.clone()
    try:
        weight += torch.outer(edit.written, edit.u)
        assert torch.allclose(found, model.logits(tokens), atol=1e-4)
    finally:
        weight.copy_(kept)


def test_the_update_is_that_of_the_formula(model: NativeModel) -> None:
    """u = C⁻¹ k* / (k*ᵀ C⁻¹ k*), so that the edited MLP adds exactly Λ where its neurons are k*."""
    request, covariance = requests()[0], moment(model, 0)
    edit = rank_one(model, request, Variant(0), covariance)
    keys = model.capture(torch.tensor(request.prompts), "blocks.0.mlp.hook_post")[:, SUBJECT_AT].double()
    k = keys.mean(0)
    ridge = 1e-4 * covariance.diagonal().mean() * torch.eye(len(k), dtype=torch.float64)
    solved = torch.linalg.inv(covariance + ridge) @ k
    assert torch.allclose(edit.u.double(), solved / (solved @ k), atol=1e-4)
    assert float(edit.u.double() @ k) == pytest.approx(1.0, abs=1e-5)


def test_rome_changes_one_fact_where_it_is_and_fails_elsewhere(model: NativeModel) -> None:
    """Right layer and token: the fact and its paraphrases change, neighbours stay. Layer 1's MLP is read by nobody."""
    variants = {
        "right": Variant(0),
        "identity": Variant(0, whitened=False),
        "layer_1": Variant(1),
        "next_token": Variant(0, 1),
    }
    moments = {layer: moment(model, layer) for layer in (0, 1)}
    measures = rome(model, requests(), variants, moments.__getitem__, meanings={name: name for name in variants})
    right = {name: float(measure.value) for name, measure in measures.items()}
    assert right == {"efficacy": 1.0, "paraphrase": 1.0, "neighbours": 1.0, "other_relations": 1.0}
    controls = {name: {k: float(c.value) for k, c in m.controls.items()} for name, m in measures.items()}
    assert controls["efficacy"]["unedited"] == 0.0
    assert controls["paraphrase"]["layer_1"] == 0.0, "nothing carries layer 1's output at the subject to the end"
    assert controls["efficacy"]["identity"] == 1.0, "one neuron per subject: the covariance changes nothing here"
    assert controls["efficacy"]["next_token"] == 0.0, "the head reads the subject's token alone"


def test_unedited_questions_are_answered(model: NativeModel) -> None:
    found = scores(model, requests()[0], {})
    assert found == {"efficacy": 0.0, "paraphrase": 0.0, "neighbours": 1.0, "other_relations": 1.0}
    assert len(OBJECTS) == len(SUBJECTS)
