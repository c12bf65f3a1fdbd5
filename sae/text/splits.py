"""Which text trains and which is held out: a function of each document alone, the same in every store and run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise

from sae.text.documents import HELD_OUT_MODULUS, Document
from store.common import HELD_OUT, TRAIN

LONG_CHARACTERS = 8192  # a document of at most this many is in one split
STRETCH_CHARACTERS = 4096  # of held-out text, at most: about a thousand tokens
GAP_SHARE, EDGE_SHARE = 4, 8  # of a held-out stretch: the gap on each side, and how far a cut looks for a space


@dataclass(frozen=True)
class SplitRule:
    """How documents are divided between the splits; `held_out` is what a store or a run records of it."""

    held_out: str
    divides_long: bool

    def texts(self, document: Document) -> dict[str, list[str]]:
        """The texts of a document in each split, in order: all of it in one split, or a long one in several parts."""
        if (
            not self.divides_long
            or document.form in ("chat", "ids")
            or (document.of is None and len(document.text) <= LONG_CHARACTERS)
        ):
            return {document.split: [document.text]}
        if len(document.text) <= LONG_CHARACTERS:  # the end of a text that is divided: it has no room for gaps
            return {TRAIN: [document.text]}
        return _divided(document.text, document.digest)

    def parts(self, document: Document) -> dict[str, list[Document]]:
        """As `texts`, as documents; chats and token ids are never divided."""
        return {
            split: [document] if texts == [document.text] else [replace(document, text=text) for text in texts]
            for split, texts in self.texts(document).items()
        }


WHOLE = SplitRule("documents with blake2b(text) mod 20 == 0", divides_long=False)  # the rule of version 0.1
DIVIDED = SplitRule(
    f"documents with blake2b(text) mod {HELD_OUT_MODULUS} == 0; of documents of more than {LONG_CHARACTERS} characters "
    f"one stretch in each {HELD_OUT_MODULUS * STRETCH_CHARACTERS}, a {HELD_OUT_MODULUS}th of the text, at a place that "
    "blake2b(text) decides; the text next to it, a quarter of its length on each side, is in neither split",
    divides_long=True,
)


def rule_named(held_out: str | None) -> SplitRule:
    """The rule that a store or a run records. Raises: ValueError for an unknown one."""
    for rule in (WHOLE, DIVIDED):
        if held_out in (rule.held_out, None):
            return rule
    raise ValueError(
        f"held-out text was chosen by a rule that this version does not know: {held_out!r}. Continue with the version "
        "that started it, or choose another output path."
    )


def _divided(text: str, digest: int) -> dict[str, list[str]]:
    """The held-out stretches of a long text, and what is left of it between their gaps."""
    train, held_out, start = list[str](), list[str](), 0
    for stretch in _stretches(len(text), digest):
        length = len(stretch)
        gap, edge = length // GAP_SHARE, length // EDGE_SHARE
        train.append(text[start : _after_last_space(text, stretch.start - gap - edge, stretch.start - gap)])
        first = _after_first_space(text, stretch.start, stretch.start + edge)
        held_out.append(text[first : _after_last_space(text, stretch.stop - edge, stretch.stop)])
        start = _after_first_space(text, stretch.stop + gap, stretch.stop + gap + edge)
    parts = {HELD_OUT: held_out, TRAIN: [*train, text[start:]]}
    found = {split: [part for part in texts if part.strip()] for split, texts in parts.items()}
    return {split: texts for split, texts in found.items() if texts}


def _stretches(characters: int, digest: int) -> Iterator[range]:
    """One held-out stretch, a twentieth long, in each period of a text; a gap fits between it and the period's ends."""
    periods = -(-characters // (HELD_OUT_MODULUS * STRETCH_CHARACTERS))
    bounds = [characters * number // periods for number in range(periods + 1)]
    for number, (start, stop) in enumerate(pairwise(bounds)):
        length = (stop - start) // HELD_OUT_MODULUS
        gap = length // GAP_SHARE
        seed = digest.to_bytes(8, "big") + number.to_bytes(8, "big")
        chosen = int.from_bytes(blake2b(seed, digest_size=8, person=b"held out").digest(), "big")
        first = start + gap + chosen % (stop - start - length - 2 * gap)
        yield range(first, first + length)


def _after_first_space(text: str, low: int, high: int) -> int:
    """The first place in [low, high] that follows white space; `low` if there is none."""
    return next((at for at in range(low, min(high, len(text)) + 1) if at and text[at - 1].isspace()), low)


def _after_last_space(text: str, low: int, high: int) -> int:
    """The last place in [low, high] that follows white space; `high` if there is none."""
    return next((at for at in range(high, max(low, 0), -1) if text[at - 1].isspace()), high)
