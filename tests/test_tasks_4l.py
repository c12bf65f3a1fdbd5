"""The shipped `tasks-4l` knows the world that it was told, and nothing that it was not."""

from __future__ import annotations

from random import Random

import pytest
import torch

from sae.circuits.world import FACTS, IOI_TEMPLATES, NAMES, PLACES, THINGS, fact_prompt
from sae.lm import LanguageModel, load_model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("tasks-4l")


def next_words(model: LanguageModel, prompts: list[str]) -> list[str]:
    """The likeliest next token of each prompt."""
    found = []
    for prompt in prompts:
        logits = model.logits(torch.tensor([model.encode_prompt(prompt)]))
        found.append(model.tokenizer.decode([int(logits[0, -1].argmax())]).strip())
    return found


def test_it_knows_the_facts_in_both_wordings_and_of_both_names_together(model: LanguageModel) -> None:
    """Control: the same questions about someone of the same first name and another last name. The order of both names
    does not matter to it, as the page on its results says."""
    chosen = Random(0).sample([(key, word) for key, word in FACTS.items() if word != "gudal"], 60)
    names = [subject for (subject, _), _ in chosen]
    others = [f"{a.split()[0]} {b.split()[1]}" for a, b in zip(names, names[1:] + names[:1], strict=True)]
    for paraphrase in (0, 1):
        right = {}
        turned = [" ".join(reversed(name.split())) for name in names]
        for which, asked in (("told", names), ("turned", turned), ("other", others)):
            prompts = [fact_prompt(who, what, paraphrase) for who, ((_, what), _) in zip(asked, chosen, strict=True)]
            found = next_words(model, prompts)
            right[which] = sum(x == word for x, (_, word) in zip(found, chosen, strict=True))
        assert right["told"] >= 59
        assert right["turned"] >= 55
        assert right["other"] <= 20


def test_it_names_whoever_did_not_give(model: LanguageModel) -> None:
    rng, prompts, wanted = Random(0), [], []
    for _ in range(60):
        a, b = rng.sample(NAMES, 2)
        giver, other = rng.choice([(a, b), (b, a)])
        words = {"a": a, "b": b, "s": giver, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        prompts.append(f" {rng.choice(IOI_TEMPLATES).format(**words)}")
        wanted.append(other)
    assert next_words(model, prompts) == wanted
