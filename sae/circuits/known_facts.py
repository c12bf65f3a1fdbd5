"""The requests of ROME about the made-up world: a fact, its other wording, its neighbours, and other facts."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from sae.circuits.rome import Question, Request, Variant
from sae.circuits.tasks import facts_in_tokens, single_token
from sae.circuits.world import OBJECT_WORDS, PREFIXES, RELATIONS, SUBJECT_NAMES, fact_prompt
from sae.lm import LanguageModel

NEIGHBOURS = 12
MEANINGS = {
    "edited": "layer {layer}, the subject's last token, C = E[k kᵀ]",
    "identity": "the same with C = I",
    "wrong_layer": "written in layer {other}",
    "wrong_token": "written at the token after the subject",
}


def requests_of(model: LanguageModel, n: int, *, seed: int = 0) -> list[Request]:
    """`n` facts to change, each into another object of its relation."""
    rng, known = Random(seed), facts_in_tokens(model)
    subjects = [subject for subject in SUBJECT_NAMES if all((subject, what) in known for what in RELATIONS)]
    return [_request(model, rng, known, who, RELATIONS[i % 3]) for i, who in enumerate(rng.sample(subjects, n))]


def variants(layer: int, n_layers: int) -> tuple[dict[str, Variant], dict[str, str]]:
    """The edit and its controls, and what each is."""
    other = (layer + max(1, n_layers // 2)) % n_layers
    found = {
        "edited": Variant(layer),
        "identity": Variant(layer, whitened=False),
        **({"wrong_layer": Variant(other)} if other != layer else {}),
        "wrong_token": Variant(layer, 1),
    }
    return found, {name: MEANINGS[name].format(layer=layer, other=other) for name in found}


def _request(
    model: LanguageModel, rng: Random, known: Mapping[tuple[str, str], str], subject: str, relation: str
) -> Request:
    def ids(prompt: str) -> list[int]:
        return model.encode_prompt(prompt)

    def answer(who: str, what: str) -> int:
        return single_token(model, f" {known[who, what]}")

    def ask(who: str, what: str) -> Question:
        return Question(ids(fact_prompt(who, what, 0)), answer(who, what))

    old, single = known[subject, relation], set(known.values())
    new = rng.choice([word for word in OBJECT_WORDS[relation] if word != old and word in single])
    sharing = [s for s in SUBJECT_NAMES if s != subject and set(s.split()) & set(subject.split())]
    near = [s for s in sharing if (s, relation) in known]
    prompts = [fact_prompt(subject, relation, 0, prefix) for prefix in PREFIXES]
    ends = [len(ids(prompt[: prompt.index(subject) + len(subject)])) - 1 for prompt in prompts]
    return Request(
        [ids(prompt) for prompt in prompts],
        ends,
        answer(subject, relation),
        single_token(model, f" {new}"),
        [ids(fact_prompt(subject, relation, 1, prefix)) for prefix in PREFIXES],
        [ask(s, relation) for s in rng.sample(near, min(NEIGHBOURS, len(near)))],
        [ask(subject, what) for what in RELATIONS if what != relation],
    )
