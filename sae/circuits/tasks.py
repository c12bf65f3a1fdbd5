"""Tasks for patching: pairs of prompts that differ in what decides the answer, and the two answers.

The metric is the logit difference LD = logit(answer) − logit(wrong) at the last token. The corrupt prompt asks for the
wrong answer, so that LD changes its sign if the model solves the task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.circuits.world import FACTS, IOI_TEMPLATES, NAMES, OBJECT_WORDS, PLACES, THINGS, fact_prompt
from sae.lm import LanguageModel

SEGMENT_TOKENS = 24
END = "end"


class TaskError(ValueError):
    """A task that this model or file cannot give; the message says why."""


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts of a task, padded on the right; what comes after a prompt's end does not change its prediction.

    `answers` are the ids of the right and the wrong answer. `positions` names places in the prompts, `end` their last
    token among them.
    """

    name: str
    clean: Int[Tensor, "prompt pos"]
    corrupt: Int[Tensor, "prompt pos"]
    answers: Int[Tensor, "prompt 2"]
    positions: Mapping[str, Int[Tensor, " prompt"]]

    def __len__(self) -> int:
        return len(self.clean)

    def logit_difference(self, logits: Float[Tensor, "prompt pos d_vocab"]) -> Float[Tensor, " prompt"]:
        """logit(answer) − logit(wrong) at the end of each prompt."""
        row = torch.arange(len(self), device=logits.device)
        last = logits[row, self.positions[END].to(logits.device)]
        both = last.gather(1, self.answers.to(logits.device))
        return both[:, 0] - both[:, 1]


@dataclass(frozen=True)
class Pair:
    """One prompt of a task, as token ids."""

    clean: Sequence[int]
    corrupt: Sequence[int]
    answers: tuple[int, int]
    positions: Mapping[str, int]


def task_of(model: LanguageModel, name: str, n: int, *, seed: int = 0) -> Task:
    """`induction`, `ioi`, `facts`, or a file of JSON lines with "clean", "corrupt", "answer" and "wrong".

    Raises: TaskError for an unknown name, a tokenizer without the words of the task, or a line that cannot be used.
    """
    if name in TASKS:
        return _padded(name, TASKS[name](model, n, Random(seed)), model)
    path = Path(name)
    if path.suffix != ".jsonl" or not path.is_file():
        raise TaskError(f"there is no task {name!r}; give {', '.join(TASKS)} or an existing FILE.jsonl.")
    return _padded(path.stem, _from_file(model, path, n), model)


def induction_of(model: LanguageModel, tokens: Sequence[int], n: int, *, seed: int = 0) -> Task:
    """The task `induction` in these tokens. Raises: TaskError for fewer than 24."""
    if len(tokens) < SEGMENT_TOKENS:
        raise TaskError(f"induction: {len(tokens)} tokens to draw from; it needs at least {SEGMENT_TOKENS}.")
    return _padded("induction", _induction(model, list(tokens), n, Random(seed)), model)


def induction(model: LanguageModel, n: int, rng: Random) -> list[Pair]:
    """`… a b … c d … a → b` in random tokens; the corrupt prompt is `… c b … a d … a → d`."""
    return _induction(model, [i for i in model.token_ids.tolist() if i != model.bos_id], n, rng)


def _induction(model: LanguageModel, ids: list[int], n: int, rng: Random) -> list[Pair]:
    start = [] if model.bos_id is None else [model.bos_id]
    pairs = []
    for _ in range(n):
        segment = rng.sample(ids, SEGMENT_TOKENS)
        first, other = sorted(rng.sample(range(0, SEGMENT_TOKENS - 1, 2), 2))
        if rng.random() < 0.5:
            first, other = other, first
        swapped = list(segment)
        swapped[first], swapped[other] = segment[other], segment[first]
        a, b, d = segment[first], segment[first + 1], segment[other + 1]
        places = {"first": first, "after_first": first + 1, "other": other, "after_other": other + 1}
        places = {name: place + len(start) for name, place in places.items()}
        pairs.append(Pair([*start, *segment, a], [*start, *swapped, a], (b, d), places))
    return pairs


def ioi(model: LanguageModel, n: int, rng: Random) -> list[Pair]:
    """Indirect object identification: `when A and B went …, B gave … to → A`; in the corrupt prompt A gives.

    Source: Wang et al. 2022, arXiv 2211.00593.
    """
    names = [name for name in NAMES if _tokens(model, f" {name}") == 1]
    if len(names) < 4:
        raise TaskError(
            f"ioi: {len(names)} of the task's {len(NAMES)} names are one token of {model.id}; it needs at least 4. The "
            "model tasks-4l was trained on them; other models can be given prompts in a FILE.jsonl."
        )
    pairs = []
    for _ in range(n):
        subject, other = rng.sample(names, 2)
        a, b = (subject, other) if rng.random() < 0.5 else (other, subject)
        template = rng.choice(IOI_TEMPLATES)
        words = {"a": a, "b": b, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        clean, corrupt = (template.format(**words, s=giver) for giver in (subject, other))
        pair = pair_of(model, clean, corrupt, f" {other}", f" {subject}")
        name_ids = {who: single_token(model, f" {who}") for who in (subject, other)}
        at = {who: pair.clean.index(number) for who, number in name_ids.items()}
        second = next(i for i, (x, y) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if x != y)
        pairs.append(Pair(*_parts(pair), {"io": at[other], "s1": at[subject], "s2": second}))
    return pairs


def facts(model: LanguageModel, n: int, rng: Random) -> list[Pair]:
    """`the home of SUBJECT is → object`; the corrupt prompt names a subject with another object for the relation."""
    pairs: list[Pair] = []
    known = facts_in_tokens(model)
    while len(pairs) < n:
        (subject, relation), (other, _) = rng.choice(list(known)), rng.choice(list(known))
        right, wrong = known[subject, relation], known.get((other, relation))
        if wrong is None or right == wrong:
            continue
        paraphrase = rng.randrange(2)
        clean, corrupt = (fact_prompt(who, relation, paraphrase) for who in (subject, other))
        pair = pair_of(model, clean, corrupt, f" {right}", f" {wrong}")
        differ = [i for i, (x, y) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if x != y]
        last = differ[-1]
        pairs.append(Pair(*_parts(pair), {"subject_first": last - 1, "subject_last": last, "after_subject": last + 1}))
    return pairs


def facts_in_tokens(model: LanguageModel) -> dict[tuple[str, str], str]:
    """The facts whose object is one token of the model. Raises: TaskError for fewer than half of them."""
    single = {word for words in OBJECT_WORDS.values() for word in words if _tokens(model, f" {word}") == 1}
    found = {key: word for key, word in FACTS.items() if word in single}
    if len(found) < len(FACTS) / 2:
        raise TaskError(
            f"facts: of {len(FACTS)} facts, {len(found)} have an object that is one token of {model.id}. The model "
            "tasks-4l was trained on them; other models can be given prompts in a FILE.jsonl."
        )
    return found


def _tokens(model: LanguageModel, text: str) -> int:
    return len(model.tokenizer.encode(text, add_special_tokens=False).ids)


Maker = Callable[[LanguageModel, int, Random], list[Pair]]
TASKS: dict[str, Maker] = {"induction": induction, "ioi": ioi, "facts": facts}


def pair_of(model: LanguageModel, clean: str, corrupt: str, answer: str, wrong: str) -> Pair:
    """A pair of prompts from texts. Raises: TaskError unless both have as many tokens and the answers have one each."""
    ids, other = model.encode_prompt(clean), model.encode_prompt(corrupt)
    if len(ids) != len(other):
        raise TaskError(
            f"{clean!r} has {len(ids)} tokens, {corrupt!r} has {len(other)}: patching needs prompts of equal length. "
            "Change words for others with as many tokens."
        )
    return Pair(ids, other, (single_token(model, answer), single_token(model, wrong)), {})


def _parts(pair: Pair) -> tuple[Sequence[int], Sequence[int], tuple[int, int]]:
    return pair.clean, pair.corrupt, pair.answers


def single_token(model: LanguageModel, text: str) -> int:
    """The id of a text that is one token. Raises: TaskError if it is several."""
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        raise TaskError(f"{text!r} is {len(ids)} tokens of {model.id}; an answer must be one, space included.")
    return int(ids[0])


def _from_file(model: LanguageModel, path: Path, n: int) -> list[Pair]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:n], 1):
        try:
            found = json.loads(line)
            pair = pair_of(model, *(str(found[key]) for key in ("clean", "corrupt", "answer", "wrong")))
            places = {str(k): int(v) for k, v in dict(found.get("positions", {})).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise TaskError(
                f'{path}:{number}: {error}. A line has "clean", "corrupt", "answer" and "wrong".'
            ) from error
        if any(not 0 <= place < len(pair.clean) for place in places.values()):
            raise TaskError(f"{path}:{number}: a position is outside the prompt's 0 … {len(pair.clean) - 1}.")
        pairs.append(Pair(*_parts(pair), places))
    if not pairs:
        raise TaskError(f"{path} has no lines.")
    return pairs


def _padded(name: str, pairs: Sequence[Pair], model: LanguageModel) -> Task:
    longest = max(len(pair.clean) for pair in pairs)
    if longest > model.context_tokens:
        raise TaskError(f"{name}: a prompt has {longest} tokens; contexts of {model.id} have {model.context_tokens}.")

    def rows(sequences: Iterable[Sequence[int]]) -> Int[Tensor, "prompt pos"]:
        return torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in sequences])

    shared = set.intersection(*(set(pair.positions) for pair in pairs))
    places = {key: torch.tensor([pair.positions[key] for pair in pairs]) for key in pairs[0].positions if key in shared}
    places[END] = torch.tensor([len(pair.clean) - 1 for pair in pairs])
    answers = torch.tensor([pair.answers for pair in pairs])
    return Task(name, rows(p.clean for p in pairs), rows(p.corrupt for p in pairs), answers, places)
