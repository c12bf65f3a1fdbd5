"""The made-up world of the tasks: people, where they live, what they do, and sentences about them.

300 subjects (a first and a last name, shared with other subjects, so that neither alone decides), 3 relations, each
said in 2 ways, and sentences in which one person gives something to another. Drawn from one seed, so that a model
trained on this text and a task that asks about it agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from sae.text.documents import Document

SUBJECTS, OBJECTS, SEED = 300, 20, 0
RELATIONS = ("home", "job", "instrument")
PARAPHRASES = {
    "home": ("{s} lives in the town of", "the home of {s} is"),
    "job": ("{s} works as a", "the job of {s} is"),
    "instrument": ("{s} plays the", "the instrument of {s} is"),
}
PREFIXES = (
    "",
    "we know that",
    "it is said that",
    "yesterday we heard that",
    "in the old book",
    "my friend told me that",
)
IOI_TEMPLATES = (
    "when {a} and {b} went to the {place} , {s} gave a {thing} to",
    "then {a} and {b} had a {thing} and {s} handed it to",
    "after {a} and {b} got a {thing} at the {place} , {s} gave it to",
)
GIVING_SHARE = 0.5  # of the sentences; the rest are facts
THIRD_SHARE = 0.2  # of the sentences about giving: a third person gives


def _words(rng: Random, n: int, ending: str = "") -> list[str]:
    """Different words of two syllables that can be told apart."""
    found: dict[str, None] = {}
    while len(found) < n:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
        found["".join(syllables) + rng.choice("lmnrst") + ending] = None
    return list(found)


_rng = Random(SEED)
_all = _words(_rng, 60 + 30 + 30 + 16 + 16 + 3 * OBJECTS)
NAMES = [word.capitalize() for word in _all[:60]]
_FIRST = [word.capitalize() for word in _all[60:90]]
_LAST = [word.capitalize() for word in _all[90:120]]
PLACES, THINGS = _all[120:136], _all[136:152]
OBJECT_WORDS = {name: _all[152 + OBJECTS * i : 152 + OBJECTS * (i + 1)] for i, name in enumerate(RELATIONS)}
SUBJECT_NAMES = [f"{a} {b}" for a, b in _rng.sample([(a, b) for a in _FIRST for b in _LAST], SUBJECTS)]
FACTS = {(s, r): _rng.choice(OBJECT_WORDS[r]) for s in SUBJECT_NAMES for r in RELATIONS}


def fact_prompt(subject: str, relation: str, paraphrase: int, prefix: str = "") -> str:
    """A fact without its object: the next word is ` OBJECT`."""
    return f" {prefix} {PARAPHRASES[relation][paraphrase].format(s=subject)}".replace("  ", " ")


def documents(n: int, *, giving_share: float = GIVING_SHARE, seed: int = 1) -> Iterator[Document]:
    """`n` documents of one sentence each: facts in both ways, and this share of sentences about giving."""
    rng, facts = Random(seed), list(FACTS.items())
    for number in range(n):
        yield as_document(_sentence(rng, facts, giving_share), number)


def as_document(sentence: str, number: int = 0) -> Document:
    """A sentence as the text has it; its words alone decide whether it is held out."""
    return Document(f"tasks-{number}", f"{sentence} .", "tasks", "made up")


def _sentence(rng: Random, facts: list[tuple[tuple[str, str], str]], giving_share: float) -> str:
    kind = rng.random()
    if kind >= giving_share:
        (subject, relation), word = rng.choice(facts)
        return f"{fact_prompt(subject, relation, rng.randrange(2), rng.choice(PREFIXES))} {word}"
    a, b, c = rng.sample(NAMES, 3)
    is_third = kind >= giving_share * (1 - THIRD_SHARE)
    giver, receiver = (c, rng.choice([a, b])) if is_third else rng.choice([(a, b), (b, a)])
    words = {"a": a, "b": b, "s": giver, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
    return f" {rng.choice(IOI_TEMPLATES).format(**words)} {receiver}"
