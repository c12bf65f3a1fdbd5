"""How many lanes of text a split gets: 64 where there are many documents, fewer where whole lanes would stay empty.

A lane of text fills its own share of the shards from its own documents. With ten long documents, ten of 64 lanes have
text and the others none; in one lane of text, every document fills the next shard. Fewer lanes of text cost time only:
each worker tokenises the text of all lanes that it has a shard of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
from jaxtyping import Float

from sae.harvesting.lanes import EmptySplit, Plan
from sae.text.documents import Document
from sae.text.packing import Tokenising
from sae.text.sources import TextSource
from sae.text.splits import LONG_CHARACTERS, SplitRule
from store.common import HELD_OUT, LANES, SPLITS, TRAIN

SURVEY_CHARACTERS = 1 << 29  # how much of a text is read to decide, at most
SAMPLED_DOCUMENTS, SAMPLED_CHARACTERS = 256, 4096  # tokenised to estimate the tokens of a character
# The number of lanes is the largest that holds this share of what one lane would hold. Held-out text, of which there is
# little, keeps its 64 lanes longer, so that stores of many documents have the held-out rows that version 0.1 gave them.
LEAST_SHARE, HELD_OUT_SHARE_OF_64 = 0.98, 0.8
CERTAIN = 2.0  # reading stops when each lane has this many times the characters that it seems to need


@dataclass
class Survey:
    """What a text holds: estimated tokens of each of the 64 lanes, by split, and whether all of the text was read."""

    documents: int = 0
    tokens: dict[str, Float[np.ndarray, " lanes"]] = field(
        default_factory=lambda: {split: np.zeros(LANES) for split in SPLITS}
    )
    whole: bool = False

    def text_lanes(self, planned: Plan) -> dict[str, int]:
        """The lanes of text of each split."""
        room, shares = self.room(planned), {TRAIN: LEAST_SHARE, HELD_OUT: HELD_OUT_SHARE_OF_64}
        if planned.ring_shards_per_lane is not None:  # each lane keeps its own newest rows, so it must have its share
            room[TRAIN] *= min(1.0, self.tokens[TRAIN].sum() / room[TRAIN].sum())
        return {split: _fitting(self.tokens[split], room[split], shares[split]) for split in SPLITS}

    @staticmethod
    def room(planned: Plan) -> dict[str, Float[np.ndarray, " lanes"]]:
        """Tokens that the shards of each of the 64 lanes hold."""
        shards = {s: [len(range(lane, n, LANES)) for lane in range(LANES)] for s, n in planned.n_shards.items()}
        return {s: np.array(n, float) * planned.contexts_per_shard * planned.seq_len for s, n in shards.items()}


def survey(model: Tokenising, source: TextSource, rule: SplitRule, planned: Plan) -> Survey:
    """Reads as much of a text as it takes to see that each lane will be full, at most half a gigabyte.

    Raises: EmptySplit when the text has no training text or no held-out text; TextError when it cannot be read.
    """
    documents = source.documents()
    first = list(islice(documents, SAMPLED_DOCUMENTS))
    per_character, usual = _tokens_per_character(model, first)
    enough = {split: CERTAIN * room for split, room in Survey.room(planned).items()}
    found, characters = Survey(), 0
    for document in chain(first, documents):
        for split, texts in rule.texts(document).items():
            length = sum(map(len, texts))
            tokens = length * per_character.get(found.documents, usual) + len(texts)
            found.tokens[split][found.documents % LANES] += tokens
            characters += length
        found.documents += 1
        if characters >= SURVEY_CHARACTERS or all((found.tokens[s] >= enough[s]).all() for s in SPLITS):
            return found
    found.whole = True
    for split in SPLITS:
        if not found.tokens[split].any():
            raise EmptySplit(_nothing_in(split, source.name, found.documents))
    return found


def _tokens_per_character(model: Tokenising, documents: list[Document]) -> tuple[dict[int, float], float]:
    """Of each of these documents, by number, and of all together."""
    texts = [document.text[:SAMPLED_CHARACTERS] for document in documents]
    counts = [len(found.ids) for found in model.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    of_each = {n: count / len(text) for n, (count, text) in enumerate(zip(counts, texts, strict=True))}
    return of_each, sum(counts) / max(1, sum(map(len, texts)))


def _fitting(tokens: Float[np.ndarray, " lanes"], room: Float[np.ndarray, " lanes"], share_of_64: float) -> int:
    """The largest number of lanes of text that holds nearly all that one lane would hold: 64, 32, … or 1."""
    most = min(tokens.sum(), room.sum())
    count = LANES
    while count > 1:
        held = sum(min(tokens[lane::count].sum(), room[lane::count].sum()) for lane in range(count))
        if held >= (share_of_64 if count == LANES else LEAST_SHARE) * most:
            break
        count //= 2
    return count


def _nothing_in(split: str, name: str, documents: int) -> str:
    what = {HELD_OUT: "is held out, so nothing could be measured on it", TRAIN: "is left to train on"}[split]
    return (
        f"harvest: no text of {name} {what}. It has {documents:,} documents, and one of at most {LONG_CHARACTERS:,} "
        "characters is held out whole or not at all: one in twenty, by its hash. Give more documents, or join short "
        "ones into one file: a longer text is divided between the splits."
    )
