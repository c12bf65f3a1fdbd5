"""How text is dealt out: document i goes to lane i mod 64, a lane packs its own documents into its own shards.

So a shard's bytes depend on the text alone: not on the number of workers, nor on where an earlier run was killed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae.text.documents import Document, sha256_of
from store.common import HELD_OUT, LANES, TRAIN

SHARD_TOKENS = 8192  # larger shards mix worse where memory is short, smaller ones cost files; bench_store.py compares


@dataclass(frozen=True)
class Plan:
    """How many shards of how many contexts a token budget makes, and how many of them a ring keeps of each lane."""

    seq_len: int
    contexts_per_shard: int
    n_shards: dict[str, int]
    ring_shards_per_lane: int | None = None

    @property
    def tokens(self) -> dict[str, int]:
        return {s: n * self.contexts_per_shard * self.seq_len for s, n in self.n_shards.items()}

    @property
    def kept_shards(self) -> int:
        """Shards on disk at the end."""
        train = self.n_shards[TRAIN]
        if self.ring_shards_per_lane is not None:
            train = min(train, self.ring_shards_per_lane * LANES)
        return self.n_shards[HELD_OUT] + train


def plan(tokens: int, heldout_tokens: int, seq_len: int, keep_rows: int | None = None) -> Plan:
    """Shards for about `tokens` training and `heldout_tokens` held-out tokens, each rounded up to whole shards.

    A shard is small enough that the smaller split still gives every lane one. With `keep_rows` the store is a ring:
    the newest training rows, at most so many, spread evenly over the lanes.
    Raises: ValueError when one of them is not positive, or `keep_rows` too small for a context of each lane.
    """
    for name, given in (("tokens", tokens), ("heldout_tokens", heldout_tokens), ("seq_len", seq_len)):
        if given < 1:
            raise ValueError(f"harvest: {name} must be at least 1, got {given}.")
    contexts = {HELD_OUT: -(-heldout_tokens // seq_len), TRAIN: -(-tokens // seq_len)}
    per_shard = max(1, min(SHARD_TOKENS // seq_len, min(contexts.values()) // LANES))
    ring = None
    if keep_rows is not None:
        if keep_rows < LANES * seq_len:
            raise ValueError(
                f"harvest: a ring of {keep_rows:,} rows is too small; {LANES} lanes with a context of {seq_len} tokens "
                f"each need at least {LANES * seq_len:,}."
            )
        per_shard = min(per_shard, keep_rows // (LANES * seq_len))
        ring = keep_rows // (LANES * seq_len * per_shard)
    return Plan(seq_len, per_shard, {split: -(-n // per_shard) for split, n in contexts.items()}, ring)


def default_heldout_tokens(tokens: int) -> int:
    """A tenth of the training tokens, between 65,536 and 262,144: enough to see features of density 1e-5."""
    return max(65_536, min(262_144, tokens // 10))


def lanes_of(rank: int, world: int) -> range:
    """The lanes of worker `rank` of `world`. Raises: ValueError unless 0 ≤ rank < world ≤ 64."""
    if not 0 <= rank < world <= LANES:
        raise ValueError(f"harvest: rank {rank} of world {world}: need 0 ≤ rank < world ≤ {LANES} (lanes of text).")
    return range(rank, LANES, world)


@dataclass
class Lane:
    """One lane of one split: the shards it still owes and the tokens waiting for the next one."""

    split: str
    owed: list[int]
    shards: list[int]
    document: int = 0  # the next document to read, and where in it
    token: int = 0
    place: int = 0  # index into `shards` of the shard being filled
    tokens: list[np.ndarray] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)
    table: dict[int, tuple[str, str, str, str]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)  # tokens of each document in `table`, BOS included
    waiting: int = 0

    @property
    def full(self) -> bool:
        return not self.owed

    def feed(self, number: int, ids: np.ndarray, document: Document) -> None:
        self.lengths[number] = len(ids)
        if number == self.document and self.token:
            ids = ids[self.token :]
        self.document, self.token = number + 1, 0
        if not len(ids):
            return
        self.tokens.append(ids)
        self.numbers.append(np.full(len(ids), number, np.int32))
        self.table[number] = (document.id, document.source, document.domain, sha256_of(document.text))
        self.waiting += len(ids)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` tokens and their document numbers; the rest waits on."""
        tokens = np.concatenate([np.empty(0, np.uint32), *self.tokens])
        numbers = np.concatenate([np.empty(0, np.int32), *self.numbers])
        self.tokens, self.numbers = [tokens[count:]], [numbers[count:]]
        self.waiting -= count
        return tokens[:count], numbers[:count]

    def cursor_after(self, number: int) -> dict[str, int]:
        """Where reading goes on once tokens up to some of document `number` are taken: what of it does not wait."""
        left = int((self.numbers[0] == number).sum())
        return (
            {"document": number, "token": self.lengths[number] - left} if left else {"document": number + 1, "token": 0}
        )

    def forget_before(self, number: int) -> None:
        self.table = {n: entry for n, entry in self.table.items() if n >= number}
        self.lengths = {n: length for n, length in self.lengths.items() if n >= number}


def open_lanes(
    n_shards: Mapping[str, int],
    markers: Mapping[str, Mapping[int, Any]],
    numbers: Iterable[int],
    only: Mapping[str, Container[int]] | None = None,
) -> dict[tuple[str, int], Lane]:
    """These lanes of both splits, each placed after its unbroken run of committed shards.

    With `only`, a lane owes no other shards than those.
    """
    lanes = {}
    for split in (HELD_OUT, TRAIN):
        there = markers[split]
        for number in numbers:
            shards = list(range(number, n_shards[split], LANES))
            owed = [s for s in shards if s not in there and (only is None or s in only[split])]
            lane = Lane(split, owed, shards)
            while lane.place < len(shards) and shards[lane.place] in there and not lane.full:
                cursor = there[shards[lane.place]].cursor
                lane.document, lane.token = cursor["document"], cursor["token"]
                lane.place += 1
            lanes[split, number] = lane
    return lanes
