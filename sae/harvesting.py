"""Harvest: text → contexts → activations → shards. Knows no file format; a `ShardSink` takes what it makes.

Document i of the source belongs to lane i mod 64, and a lane packs its documents of one split into its own contexts,
so a shard's bytes depend on the text alone: not on the number of workers, nor on where an earlier run was killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sae.documents import HELD_OUT, TRAIN, Document, sha256_of
from sae.lm import LanguageModel
from sae.progress import Interrupt, Interrupted, interruptible, progress
from sae.text import TextSource

LANES = 64
MAX_CONTEXTS_PER_SHARD = 32
TOKENISE_DOCUMENTS = 256


class ShardSink(Protocol):
    """Where shards go; `store.activations.ActivationStore` is one."""

    path: Path
    seq_len: int
    hook_points: dict[str, int]
    contexts_per_shard: int
    n_shards: dict[str, int]

    def markers(self, split: str) -> dict[int, Any]: ...

    def write_shard(
        self,
        split: str,
        shard: int,
        *,
        acts: dict[str, np.ndarray],
        tokens: np.ndarray,
        keep: np.ndarray,
        document: np.ndarray,
        documents: dict[int, tuple[str, str, str, str]],
        cursor: dict[str, Any],
    ) -> Any: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How many shards of how many contexts a token budget makes."""

    seq_len: int
    contexts_per_shard: int
    n_shards: dict[str, int]

    @property
    def tokens(self) -> dict[str, int]:
        return {s: n * self.contexts_per_shard * self.seq_len for s, n in self.n_shards.items()}


def plan(tokens: int, heldout_tokens: int, seq_len: int) -> Plan:
    """Shards for about `tokens` training and `heldout_tokens` held-out tokens, each rounded up to whole shards.

    A shard is small enough that the smaller split still gives every lane one.
    Raises: ValueError when one of the three is not positive.
    """
    for name, given in (("tokens", tokens), ("heldout_tokens", heldout_tokens), ("seq_len", seq_len)):
        if given < 1:
            raise ValueError(f"harvest: {name} must be at least 1, got {given}.")
    contexts = {HELD_OUT: -(-heldout_tokens // seq_len), TRAIN: -(-tokens // seq_len)}
    per_shard = max(1, min(MAX_CONTEXTS_PER_SHARD, min(contexts.values()) // LANES))
    return Plan(seq_len, per_shard, {split: -(-n // per_shard) for split, n in contexts.items()})


def default_heldout_tokens(tokens: int) -> int:
    """A tenth of the training tokens, between 65,536 and 262,144: enough to see features of density 1e-5."""
    return max(65_536, min(262_144, tokens // 10))


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


def harvest(model: LanguageModel, source: TextSource, sink: ShardSink) -> None:
    """Fills every shard the sink still lacks, in the same bytes whatever was there before.

    Raises: Interrupted on Ctrl-C or SIGTERM, after the shard in hand is committed.
    """
    lanes = _lanes(sink)
    shard_tokens = sink.contexts_per_shard * sink.seq_len
    total = sum(sink.n_shards.values()) * shard_tokens
    done = sum(len(sink.markers(split)) for split in (HELD_OUT, TRAIN)) * shard_tokens
    with interruptible() as interrupt, progress("harvest", total, "tok", initial=done) as bar:
        for lane in _fed_lanes(model, source, lanes):
            while lane.waiting >= shard_tokens and not lane.full:
                bar.update(_emit(model, sink, lane, shard_tokens))
                _stop_if(interrupt, sink)
        for lane in lanes.values():  # the text is over: what waits is a last, shorter shard, then empty ones
            while not lane.full:
                bar.update(_emit(model, sink, lane, lane.waiting))
                _stop_if(interrupt, sink)
    sink.finish()


def _stop_if(interrupt: Interrupt, sink: ShardSink) -> None:
    if interrupt.requested:
        raise Interrupted(f"stopped with every finished shard saved in {sink.path}. Repeat the command to go on.")


def _lanes(sink: ShardSink) -> dict[tuple[str, int], Lane]:
    """Every lane, placed after its unbroken run of committed shards."""
    lanes = {}
    for split in (HELD_OUT, TRAIN):
        markers = sink.markers(split)
        for number in range(LANES):
            shards = list(range(number, sink.n_shards[split], LANES))
            lane = Lane(split, [s for s in shards if s not in markers], shards)
            while lane.place < len(shards) and shards[lane.place] in markers and not lane.full:
                cursor = markers[shards[lane.place]].cursor
                lane.document, lane.token = cursor["document"], cursor["token"]
                lane.place += 1
            lanes[split, number] = lane
    return lanes


def _fed_lanes(model: LanguageModel, source: TextSource, lanes: dict[tuple[str, int], Lane]) -> Iterator[Lane]:
    """Reads documents in order, tokenises them for the lanes that want them, and yields each lane fed."""
    pending: list[tuple[Lane, int, Document]] = []
    for number, document in enumerate(source.documents()):
        lane = lanes[document.split, number % LANES]
        if not lane.full and number >= lane.document:
            pending.append((lane, number, document))
        if len(pending) >= TOKENISE_DOCUMENTS:
            yield from _feed(model, pending)
            pending = []
            if all(lane.full for lane in lanes.values()):
                return
    yield from _feed(model, pending)


def _feed(model: LanguageModel, pending: list[tuple[Lane, int, Document]]) -> Iterator[Lane]:
    encodings = model.tokenizer.encode_batch_fast(
        [document.text for _, _, document in pending], add_special_tokens=False
    )
    for (lane, number, document), encoding in zip(pending, encodings, strict=True):
        if not lane.full:
            start = [] if model.bos_id is None else [model.bos_id]
            lane.feed(number, np.array(start + encoding.ids, dtype=np.uint32), document)
            yield lane


def _emit(model: LanguageModel, sink: ShardSink, lane: Lane, count: int) -> int:
    """Runs the model on the lane's next `count` tokens and writes them as one shard, unless it is there already."""
    tokens, numbers = lane.take(count)
    shard = lane.shards[lane.place]
    lane.place += 1
    if shard not in lane.owed:
        return 0
    contexts = -(-count // sink.seq_len)
    padding = contexts * sink.seq_len - count
    shape = (contexts, sink.seq_len)
    filled = np.pad(np.ones(count, bool), (0, padding)).reshape(shape)
    tokens = np.pad(tokens, (0, padding)).reshape(shape)
    document = np.pad(numbers, (0, padding), constant_values=-1).reshape(shape)
    keep = filled & (tokens != (-1 if model.bos_id is None else model.bos_id))
    ids = torch.from_numpy(tokens.astype(np.int64))
    acts = {
        hook_point: model.capture(ids, hook_point).float().cpu().flatten(0, 1).numpy()
        if count
        else np.empty((0, width), np.float32)
        for hook_point, width in sink.hook_points.items()
    }
    present = np.unique(numbers).tolist()
    cursor = lane.cursor_after(present[-1]) if present else {"document": lane.document, "token": 0}
    sink.write_shard(
        lane.split,
        shard,
        acts=acts,
        tokens=tokens,
        keep=keep,
        document=document,
        documents={number: lane.table[number] for number in present},
        cursor=cursor,
    )
    lane.owed.remove(shard)
    lane.forget_before(cursor["document"])
    return count
