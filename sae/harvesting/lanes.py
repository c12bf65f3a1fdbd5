"""How text is distributed: document i goes to lane i mod 64, and a lane packs its documents into its own shards.

So a shard's bytes depend on the text alone: not on the number of workers, nor on where an earlier run was killed. The
text of few documents goes to fewer lanes (`sae.harvesting.text_lanes`): to 32, 16, … or to a single one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from store.common import HELD_OUT, LANES, SPLITS, TRAIN, DocumentRecord

SHARD_TOKENS = 8192  # larger shards mix worse where memory is short, smaller ones cost files; bench_store.py compares
ALL_TEXT_LANES = dict.fromkeys(SPLITS, LANES)


class EmptySplit(ValueError):
    """The text has nothing to train on, or nothing to hold out."""


@dataclass(frozen=True)
class Plan:
    """How many shards of how many contexts a token budget makes, and how many of each lane's a ring store keeps."""

    seq_len: int
    contexts_per_shard: int
    n_shards: dict[str, int]
    ring_shards_per_lane: int | None = None

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each split, whole shards."""
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

    A shard is small enough that the smaller split still gives each lane one. With `keep_rows` the store is a ring: it
    keeps at most that many training rows, the newest ones, spread evenly over the lanes.
    Raises: ValueError when a number is not positive, or `keep_rows` is less than one context for each lane.
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


# --- one lane --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cursor:
    """Where reading continues after a shard: at which document, and at which of its tokens (BOS included)."""

    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class Piece:
    """The tokens of document `number` from token `first` on."""

    number: int
    first: int
    ids: np.ndarray  # uint32
    record: DocumentRecord

    def split(self, count: int) -> tuple[Piece, Piece]:
        """The first `count` tokens, and the rest."""
        rest = Piece(self.number, self.first + count, self.ids[count:], self.record)
        return Piece(self.number, self.first, self.ids[:count], self.record), rest


@dataclass(frozen=True)
class ShardText:
    """The text of one shard: token ids [n] and the document number of each [n]; fewer than a full shard at the end."""

    shard: int
    tokens: np.ndarray  # uint32
    numbers: np.ndarray  # int32
    documents: dict[int, DocumentRecord]
    cursor: Cursor


@dataclass
class Lane:
    """One lane of text of a split. `feed` it documents in order; `shards` packs them end to end into missing shards."""

    split: str
    shard_tokens: int
    numbers: deque[int]  # its shards from the cursor on
    missing: set[int]  # the shards of `numbers` to write; the text of the others is skipped
    cursor: Cursor = field(default_factory=Cursor)  # up to where documents were fed
    waiting: deque[Piece] = field(default_factory=deque)
    waiting_tokens: int = 0

    @property
    def full(self) -> bool:
        """Whether no shard is missing."""
        return not self.missing

    def feed(self, number: int, ids: np.ndarray, record: DocumentRecord) -> None:
        """Appends a document; of the document at the cursor, only the part that is in no earlier shard."""
        first = self.cursor.token if number == self.cursor.document else 0
        self.cursor = Cursor(number + 1)
        if len(ids) > first:
            self.waiting.append(Piece(number, first, ids[first:], record))
            self.waiting_tokens += len(ids) - first

    def shards(self, *, text_ended: bool = False) -> Iterator[ShardText]:
        """The missing shards that the waiting tokens fill; at the end of the text all of them, the last ones empty."""
        while not self.full and (text_ended or self.waiting_tokens >= self.shard_tokens):
            text = self._take(self.numbers.popleft())
            if text.shard in self.missing:
                self.missing.remove(text.shard)
                yield text

    def _take(self, shard: int) -> ShardText:
        """The next shard's worth of the waiting tokens."""
        taken: list[Piece] = []
        room, cursor = self.shard_tokens, Cursor(self.cursor.document)
        while room and self.waiting:
            piece, rest = self.waiting.popleft().split(room)
            taken.append(piece)
            room -= len(piece.ids)
            cursor = Cursor(piece.number + 1)
            if len(rest.ids):
                self.waiting.appendleft(rest)
                cursor = Cursor(rest.number, rest.first)
        self.waiting_tokens -= self.shard_tokens - room
        return ShardText(
            shard,
            np.concatenate([np.empty(0, np.uint32), *(piece.ids for piece in taken)]),
            np.concatenate([np.empty(0, np.int32), *(np.full(len(p.ids), p.number, np.int32) for p in taken)]),
            {piece.number: piece.record for piece in taken},
            cursor,
        )


def open_lanes(
    n_shards: Mapping[str, int],
    shard_tokens: int,
    markers: Mapping[str, Mapping[int, Any]],
    numbers: Container[int],
    only: Mapping[str, Container[int]] | None = None,
    text_lanes: Mapping[str, int] = ALL_TEXT_LANES,
) -> dict[tuple[str, int], Lane]:
    """The lanes of text of both splits, each starting after its unbroken run of committed shards.

    Lane of text i has the shards i, i + `text_lanes`, …; missing are those that the worker's lanes `numbers` have to
    write. With `only`, no other shards count as missing.
    """
    lanes = {}
    for split in SPLITS:
        there = markers[split]
        for number in range(text_lanes[split]):
            shards = range(number, n_shards[split], text_lanes[split])
            committed = list(takewhile(there.__contains__, shards))
            found = there[committed[-1]].cursor if committed else {"document": 0, "token": 0}
            ours = (s for s in shards if s % LANES in numbers and s not in there)
            lanes[split, number] = Lane(
                split,
                shard_tokens,
                deque(shards[len(committed) :]),
                {s for s in ours if only is None or s in only[split]},
                Cursor(found["document"], found["token"]),
            )
    return lanes
