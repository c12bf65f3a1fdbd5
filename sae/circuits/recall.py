"""What a model knows of the made-up world: facts and sentences about giving, in words that no training text has.

A sentence is held out by its own words (`sae.text.splits`), so a fact is asked for with a prefix and a paraphrase in
which it was never told, and the words of a sentence about giving never came together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.circuits.intervals import mean_interval
from sae.circuits.results import Control, Measure
from sae.circuits.tasks import facts_in_tokens, single_token
from sae.circuits.world import IOI_TEMPLATES, NAMES, PLACES, PREFIXES, RELATIONS, THINGS, as_document, fact_prompt
from sae.lm import LanguageModel
from store.common import HELD_OUT


class Asked(NamedTuple):
    """A prompt, its answer, and what the control asks: another prompt, or the same, and its answer."""

    prompt: str
    answer: str
    control_prompt: str
    control_answer: str


def recall(model: LanguageModel, n: int, *, seed: int = 0) -> tuple[dict[str, Measure], dict[str, list[str]]]:
    """The share of answers on top, of at most `n` held-out facts in each paraphrase and `n` sentences about giving."""
    rng = Random(seed)
    known = facts_in_tokens(model)
    told = [held_out_facts(known, paraphrase, rng)[:n] for paraphrase in (0, 1)]
    given = [held_out_giving(rng, template, n) for template in range(len(IOI_TEMPLATES))]
    kinds: dict[str, tuple[Sequence[Sequence[Asked]], str, str, tuple[str, ...]]] = {
        "facts_recalled": (
            told,
            "share of held-out sentences about a fact whose object is the likeliest next token",
            "the object of another subject, drawn at random, is the likeliest",
            ("paraphrase",),
        ),
        "ioi_recalled": (
            given,
            "share of held-out sentences about giving whose indirect object is the likeliest next token",
            "a third person gives, so that both people named may receive: the same one is the likeliest",
            ("template",),
        ),
    }
    measures = {}
    for name, (groups, formula, what, axes) in kinds.items():
        found = [_right(model, group, lambda a: (a.prompt, a.answer)) for group in groups]
        control = [_right(model, group, lambda a: (a.control_prompt, a.control_answer)) for group in groups]
        measures[name] = Measure(
            _means(found),
            sum(map(len, groups)),
            "sentences",
            formula,
            {"other_answer": Control(_means(control), what, _intervals(control))},
            _intervals(found),
            axes,
        )
    ways = [fact_prompt("…", "job", paraphrase).strip() for paraphrase in (0, 1)]
    return measures, {"paraphrase": ways, "template": list(IOI_TEMPLATES)}


def held_out_facts(known: Mapping[tuple[str, str], str], paraphrase: int, rng: Random) -> list[Asked]:
    """Each fact with each prefix in this paraphrase, of which about one in twenty is held out; shuffled.

    `known` is the object by subject and relation.
    """
    found = []
    words = {what: sorted({word for (_, r), word in known.items() if r == what}) for what in RELATIONS}
    for (subject, relation), word in known.items():
        for prefix in PREFIXES:
            prompt = fact_prompt(subject, relation, paraphrase, prefix)
            if as_document(f"{prompt} {word}").split == HELD_OUT:
                others = [each for each in words[relation] if each != word]
                found.append(Asked(prompt, word, prompt, rng.choice(others)))
    rng.shuffle(found)
    return found


def held_out_giving(rng: Random, template: int, n: int) -> list[Asked]:
    """`n` held-out sentences about giving in one template."""
    found: list[Asked] = []
    while len(found) < n:
        a, b, third = rng.sample(NAMES, 3)
        giver, receiver = rng.choice([(a, b), (b, a)])
        words = {"a": a, "b": b, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        prompt, control = (f" {IOI_TEMPLATES[template].format(**words, s=who)}" for who in (giver, third))
        if as_document(f"{prompt} {receiver}").split == HELD_OUT:
            found.append(Asked(prompt, receiver, control, receiver))
    return found


def _right(
    model: LanguageModel, asked: Sequence[Asked], which: Callable[[Asked], tuple[str, str]]
) -> Float[Tensor, " prompt"]:
    """1 where the answer is the likeliest next token, otherwise 0."""
    prompts = [model.encode_prompt(which(each)[0]) for each in asked]
    answers = torch.tensor([single_token(model, f" {which(each)[1]}") for each in asked])
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in prompts])
    ends = torch.tensor([len(ids) - 1 for ids in prompts])
    logits = torch.cat([model.logits(part).cpu() for part in torch.split(tokens, 256)])
    return logits[torch.arange(len(ends)), ends].argmax(-1).eq(answers).double()


def _means(groups: Sequence[Float[Tensor, " prompt"]]) -> Tensor:
    return torch.stack([each.mean() for each in groups])


def _intervals(groups: Sequence[Float[Tensor, " prompt"]]) -> tuple[Tensor, Tensor]:
    low, high = zip(*(mean_interval(each) for each in groups), strict=True)
    return torch.stack(low), torch.stack(high)
