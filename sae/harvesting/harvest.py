"""Harvest: text → contexts → activations → shards, which a `ShardSink` stores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sae.harvesting.lanes import EmptySplit, Lane, ShardText, open_lanes
from sae.jobs.memory import resident_bytes
from sae.jobs.progress import Interrupted, interruptible, progress
from sae.lm import LanguageModel
from sae.text.documents import Document, record_of
from sae.text.packing import FORWARD_TOKENS, packed, text_tokens, tokenised
from sae.text.sources import TextSource
from sae.text.splits import DIVIDED, SplitRule
from store.common import LANES, SPLITS, DocumentRecord

SHARDS_IN_HAND = 4  # in memory at once: one being computed, one waiting, one being written, and its encoded form


class ShardSink(Protocol):
    """Stores shards, as `store.activations.ActivationStore` does."""

    seq_len: int
    hook_points: dict[str, int]
    dtype: dict[str, str]
    contexts_per_shard: int
    n_shards: dict[str, int]
    text_lanes: dict[str, int]

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
        documents: dict[int, DocumentRecord],
        cursor: dict[str, Any],
    ) -> Any: ...

    def finish(self) -> None: ...


Write = Callable[..., None]


class OutOfMemoryBudget(ValueError):
    """The harvest exceeded its memory budget and stopped, with every finished shard saved."""


def harvest(
    model: LanguageModel,
    source: TextSource,
    sink: ShardSink,
    *,
    rule: SplitRule = DIVIDED,
    lanes: Iterable[int] = range(LANES),
    only: Mapping[str, Container[int]] | None = None,
    max_ram_bytes: int | None = None,
    context_bos: bool = False,
) -> bool:
    """Writes every shard of these lanes (and of `only`) that the sink lacks; its bytes depend on the text alone.

    With `context_bos` every context begins with the model's BOS token; `rule` divides the text between the splits.
    True once no shard of any lane is missing; then the store is finished.
    Raises, after the shards in hand are committed: Interrupted on Ctrl-C or SIGTERM; OutOfMemoryBudget when the process
    holds more than `max_ram_bytes`; EmptySplit, in place of finishing, when a split has no kept row.
    """
    numbers = set(lanes)
    markers = {split: sink.markers(split) for split in SPLITS}
    shard_tokens = sink.contexts_per_shard * text_tokens(sink.seq_len, context_bos)
    ours = open_lanes(sink.n_shards, shard_tokens, markers, numbers, only, sink.text_lanes)
    missing = sum(len(lane.missing) for lane in ours.values())
    done = sum(shard % LANES in numbers for split in SPLITS for shard in markers[split])
    with (
        interruptible() as interrupt,
        progress("harvest", (missing + done) * shard_tokens, "tok", initial=done * shard_tokens) as bar,
        _writing(sink, bar.update) as write,
    ):
        for split, text in _shards_of_text(model, source, rule, ours, sink.text_lanes):
            _run_model(model, sink, split, text, write, context_bos)
            if interrupt.requested:
                raise Interrupted(
                    f"stopped with every finished shard saved in {sink.path}. Repeat the command to continue."
                )
            _check_memory(max_ram_bytes, sink)
    if any(len(sink.markers(split)) < sink.n_shards[split] for split in SPLITS):
        return False
    if only is None:  # a repair finishes what there was
        _refuse_empty(sink)
    sink.finish()
    return True


def _shards_of_text(
    model: LanguageModel,
    source: TextSource,
    rule: SplitRule,
    lanes: Mapping[tuple[str, int], Lane],
    text_lanes: Mapping[str, int],
) -> Iterator[tuple[str, ShardText]]:
    """Reads the documents in order, tokenises those that a lane still needs, and yields each missing shard's text."""

    def wanted() -> Iterator[tuple[tuple[Lane, int, Document], list[Document]]]:
        for number, document in enumerate(source.documents()):
            for split, parts in rule.parts(document).items():
                lane = lanes[split, number % text_lanes[split]]
                if not lane.full and number >= lane.cursor.document:
                    yield (lane, number, document), parts
            if all(lane.full for lane in lanes.values()):
                return

    if all(lane.full for lane in lanes.values()):
        return
    for (lane, number, document), ids in tokenised(model, wanted()):
        if not lane.full:
            lane.feed(number, ids, record_of(document))
            for text in lane.shards():
                yield lane.split, text
    for lane in lanes.values():
        for text in lane.shards(text_ended=True):
            yield lane.split, text


def _refuse_empty(sink: ShardSink) -> None:
    """Raises: EmptySplit when all shards of a split are written, and no row of it is kept."""
    for split in SPLITS:
        if not any(marker.kept_rows for marker in sink.markers(split).values()):
            raise EmptySplit(
                f"harvest: not one row of the {split} split is kept. {sink.path} is not complete and cannot be used: "
                f"delete it, and harvest again with more text or more tokens."
            )


@contextmanager
def _writing(sink: ShardSink, report: Callable[[int], Any]) -> Iterator[Write]:
    """Writes shards in a thread, while the model computes the next one. `report` gets the tokens of each written."""
    pending: deque[tuple[Future[Any], int]] = deque()

    def wait(still_pending: int) -> None:
        while len(pending) > still_pending:
            future, tokens = pending.popleft()
            future.result()
            report(tokens)

    with ThreadPoolExecutor(1, thread_name_prefix="shards") as writer:

        def write(count: int, split: str, shard: int, **arrays: Any) -> None:
            wait(1)  # one being written, one waiting: memory stays that of a few shards
            pending.append((writer.submit(sink.write_shard, split, shard, **arrays), count))

        try:
            yield write
        finally:
            wait(0)


def _check_memory(max_ram_bytes: int | None, sink: ShardSink) -> None:
    if max_ram_bytes is not None and (held := resident_bytes()) > max_ram_bytes:
        raise OutOfMemoryBudget(
            f"stopped at {held / 1e6:,.0f} MB of memory, more than the {max_ram_bytes / 1e6:,.0f} MB allowed; every "
            f"finished shard is saved in {sink.path} and ready for use. Raise --max-ram (or start fewer workers) "
            "and repeat the command to continue."
        )


def _run_model(
    model: LanguageModel, sink: ShardSink, split: str, text: ShardText, write: Write, context_bos: bool
) -> None:
    """Computes a shard's activations and has them written."""
    contexts = packed(text.tokens, sink.seq_len, model.bos_id, context_bos=context_bos)
    rows = _activations(model, sink.hook_points, contexts.tokens)
    write(
        len(text.tokens),
        split,
        text.shard,
        acts={hook: _rounded(rows[hook], dtype) for hook, dtype in sink.dtype.items()},
        tokens=contexts.tokens,
        keep=contexts.keep,
        document=np.append(text.numbers, np.int32(-1))[contexts.place],
        documents=text.documents,
        cursor=asdict(text.cursor),
    )


def _activations(model: LanguageModel, hook_points: dict[str, int], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Rows [contexts · seq_len, d_in] of every hook point, computed in forward passes of bounded size."""
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
    """The rows in the store's dtype, bfloat16 as its bits. Torch rounds many times faster than numpy, to the same bits.

    Rows with a value that does not fit stay as they are, so that the store can name it.
    """
    if dtype == "float32":
        return rows
    stored = torch.from_numpy(rows).to({"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype])
    if not stored.isfinite().all():
        return rows
    return (stored.view(torch.uint16) if dtype == "bfloat16" else stored).numpy()
