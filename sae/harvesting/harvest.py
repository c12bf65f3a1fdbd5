"""Harvest: text → contexts → activations → shards. Knows no file format; a `ShardSink` takes what it makes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sae.harvesting.lanes import Lane, open_lanes
from sae.jobs.memory import resident_bytes
from sae.jobs.progress import Interrupt, Interrupted, interruptible, progress
from sae.lm import LanguageModel
from sae.text.documents import Document
from sae.text.packing import FORWARD_TOKENS, packed, tokenised
from sae.text.sources import TextSource
from store.common import HELD_OUT, LANES, TRAIN

SHARDS_IN_HAND = 4  # in memory at once: one computed, one waiting, one written, and that one as encoded


class ShardSink(Protocol):
    """Where shards go; `store.activations.ActivationStore` is one."""

    seq_len: int
    hook_points: dict[str, int]
    dtype: dict[str, str]
    contexts_per_shard: int
    n_shards: dict[str, int]

    @property
    def path(self) -> Path | str: ...

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


Write = Callable[..., None]


class OutOfMemoryBudget(ValueError):
    """The harvest grew beyond the memory it was given and stopped, with every finished shard saved."""


def harvest(
    model: LanguageModel,
    source: TextSource,
    sink: ShardSink,
    *,
    lanes: Iterable[int] = range(LANES),
    only: Mapping[str, Container[int]] | None = None,
    max_ram_bytes: int | None = None,
) -> bool:
    """Fills every shard that the sink still lacks in these lanes (and in `only`), in the same bytes whatever was there.

    True once no shard of any lane is missing; then the store is finished.
    Raises, after the shards in hand are committed: Interrupted on Ctrl-C or SIGTERM; OutOfMemoryBudget when the process
    holds more than `max_ram_bytes`.
    """
    numbers = list(lanes)
    markers = {split: sink.markers(split) for split in (HELD_OUT, TRAIN)}
    ours = open_lanes(sink.n_shards, markers, numbers, only)
    shard_tokens = sink.contexts_per_shard * sink.seq_len
    owed = sum(len(lane.owed) for lane in ours.values())
    done = sum(1 for lane in ours.values() for shard in lane.shards if shard in markers[lane.split])
    with (
        interruptible() as interrupt,
        progress("harvest", (owed + done) * shard_tokens, "tok", initial=done * shard_tokens) as bar,
        _writing(sink, bar.update) as write,
    ):
        for lane in _fed_lanes(model, source, ours) if owed else ():
            while lane.waiting >= shard_tokens and not lane.full:
                _emit(model, sink, lane, shard_tokens, write)
                _stop_if(interrupt, sink, max_ram_bytes)
        for lane in ours.values():  # the text is over: what waits is a last, shorter shard, then empty ones
            while not lane.full:
                _emit(model, sink, lane, lane.waiting, write)
                _stop_if(interrupt, sink, max_ram_bytes)
    if any(len(sink.markers(split)) < sink.n_shards[split] for split in (HELD_OUT, TRAIN)):
        return False
    sink.finish()
    return True


@contextmanager
def _writing(sink: ShardSink, report: Callable[[int], Any]) -> Iterator[Write]:
    """Writes shards in a thread, one behind the model: it computes the next one while this one goes to disk."""
    pending: deque[tuple[Future[Any], int]] = deque()

    def settle(still_pending: int) -> None:
        while len(pending) > still_pending:
            future, count = pending.popleft()
            future.result()
            report(count)

    with ThreadPoolExecutor(1, thread_name_prefix="shards") as writer:

        def write(count: int, split: str, shard: int, **arrays: Any) -> None:
            settle(1)  # one being written, one waiting: memory stays that of a few shards
            pending.append((writer.submit(sink.write_shard, split, shard, **arrays), count))

        try:
            yield write
        finally:
            settle(0)


def _stop_if(interrupt: Interrupt, sink: ShardSink, max_ram_bytes: int | None) -> None:
    if interrupt.requested:
        raise Interrupted(f"stopped with every finished shard saved in {sink.path}. Repeat the command to go on.")
    if max_ram_bytes is not None and (held := resident_bytes()) > max_ram_bytes:
        raise OutOfMemoryBudget(
            f"stopped at {held / 1e6:,.0f} MB of memory, more than the {max_ram_bytes / 1e6:,.0f} MB allowed, with "
            f"every finished shard saved in {sink.path} and ready for use. Raise --max-ram (or start fewer workers) "
            "and repeat the command to go on."
        )


def _fed_lanes(model: LanguageModel, source: TextSource, lanes: dict[tuple[str, int], Lane]) -> Iterator[Lane]:
    """Reads documents in order, tokenises them for the lanes that want them, and yields each lane fed."""

    def wanted() -> Iterator[tuple[int, Document]]:
        for number, document in enumerate(source.documents()):
            lane = lanes.get((document.split, number % LANES))
            if lane is not None and not lane.full and number >= lane.document:
                yield number, document
            if all(lane.full for lane in lanes.values()):
                return

    for number, document, ids in tokenised(model, wanted()):
        lane = lanes[document.split, number % LANES]
        if not lane.full:
            lane.feed(number, ids, document)
            yield lane


def _emit(model: LanguageModel, sink: ShardSink, lane: Lane, count: int, write: Write) -> None:
    """Runs the model on the lane's next `count` tokens and has them written as one shard, unless it is not owed."""
    tokens, numbers = lane.take(count)
    shard = lane.shards[lane.place]
    lane.place += 1
    if shard not in lane.owed:
        return
    document = np.pad(numbers, (0, -count % sink.seq_len), constant_values=-1).reshape(-1, sink.seq_len)
    tokens, keep = packed(tokens, sink.seq_len, model.bos_id)
    present = np.unique(numbers).tolist()
    cursor = lane.cursor_after(present[-1]) if present else {"document": lane.document, "token": 0}
    rows = _activations(model, sink.hook_points, tokens)
    write(
        count,
        lane.split,
        shard,
        acts={hook: _rounded(rows[hook], dtype) for hook, dtype in sink.dtype.items()},
        tokens=tokens,
        keep=keep,
        document=document,
        documents={number: lane.table[number] for number in present},
        cursor=cursor,
    )
    lane.owed.remove(shard)
    lane.forget_before(cursor["document"])


def _activations(model: LanguageModel, hook_points: dict[str, int], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Rows [contexts · seq_len, d_in] of every hook point from one forward pass, in parts of bounded size."""
    rows = {hook: np.empty((tokens.size, d_in), np.float32) for hook, d_in in hook_points.items()}
    seq_len = tokens.shape[1]
    contexts = max(1, FORWARD_TOKENS // seq_len)
    for first in range(0, len(tokens), contexts):
        part = torch.from_numpy(tokens[first : first + contexts].astype(np.int64))
        where = slice(first * seq_len, first * seq_len + part.numel())
        for hook, captured in model.capture_all(part, list(hook_points)).items():
            torch.from_numpy(rows[hook][where]).copy_(captured.flatten(0, 1))
    return rows


def _rounded(rows: np.ndarray, dtype: str) -> np.ndarray:
    """In the dtype of the store, bfloat16 as its bits: torch rounds many times faster than numpy, to the same bits.

    Rows with a value that does not fit stay as they are, for the store to name.
    """
    if dtype == "float32":
        return rows
    stored = torch.from_numpy(rows).to({"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype])
    if not stored.isfinite().all():
        return rows
    return (stored.view(torch.uint16) if dtype == "bfloat16" else stored).numpy()
