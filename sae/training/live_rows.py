"""Training rows from a model that runs while the dictionary trains: a shuffle buffer, nothing on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import matmul
from sae.lm import LanguageModel
from sae.parallel.mesh import ONE, Mesh
from sae.text.packing import FORWARD_TOKENS, packed, text_tokens, tokenised
from sae.text.sources import TextSource
from sae.text.splits import DIVIDED, SplitRule
from sae.training.rows import Batch, Downstream
from sae.training.shuffle_buffer import ShuffleBuffer, ShufflePlan
from store.common import LANES, TRAIN, RowFilter

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SAMPLED_FROM = 4  # a sample of n rows is drawn from the first 4 n
SPREAD_SHARE = 1 / 4  # of a run: a block spreads over at most this; filling the buffer then costs 1/8 of the rows
SAMPLE_STREAM = 1  # a stream of random numbers, separate from that of the shuffle plan


class LiveError(ValueError):
    """The text or the model yields no usable rows; the message says what to do."""


@dataclass(frozen=True)
class Contexts:
    """The training text of a source as contexts: the same as in a store with 64 lanes of text, in the order of filling.

    Document i goes to lane i mod 64; a lane joins its documents, each after a BOS. Held-out text is left out.
    Shapes: tokens and keep [n, seq_len], with as many contexts as one forward pass takes.
    """

    model: LanguageModel
    source: TextSource
    seq_len: int
    context_bos: bool = False  # whether each begins with BOS
    rule: SplitRule = DIVIDED
    row_filter: RowFilter = field(default_factory=RowFilter)  # whose positions and tokens are not kept
    lane: int = 0  # only every `lanes`-th document, from this one on
    lanes: int = 1

    def epoch(self) -> Iterator[tuple[Int[np.ndarray, "n seq_len"], np.ndarray]]:
        """Tokens and `keep` of the whole text once, one forward pass at a time."""
        filled = self._filled()
        while some := list(islice(filled, max(1, FORWARD_TOKENS // self.seq_len))):
            tokens, keep = zip(*some, strict=True)
            yield np.stack(tokens), np.stack(keep)

    def _filled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        waiting = [np.empty(0, np.uint32) for _ in range(LANES)]
        own = (each for each in enumerate(self.source.documents()) if each[0] % self.lanes == self.lane)
        numbered = ((n, self.rule.parts(document)) for n, document in own)
        training = ((n, parts[TRAIN]) for n, parts in numbered if TRAIN in parts)
        for number, ids in tokenised(self.model, training):
            tokens = np.concatenate([waiting[number % LANES], ids])
            whole = len(tokens) - len(tokens) % text_tokens(self.seq_len, self.context_bos)
            waiting[number % LANES] = tokens[whole:]
            yield from self._contexts(tokens[:whole])
        for tokens in waiting:
            yield from self._contexts(tokens)

    def _contexts(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        found = packed(tokens, self.seq_len, self.model.bos_id, context_bos=self.context_bos)
        yield from zip(found.tokens, found.keep & self.row_filter.keeps_tokens(found.tokens), strict=True)


class LiveRows:
    """Rows of a model's activations on the training documents of a text, epoch after epoch, in shuffled order.

    `hooks` maps "x" to the hook point to read and, where a recipe needs them, "y" and "resid" to theirs.
    `batch(step)` is a pure function of (model, text, seed, step, `plan`). A step that does not follow the last one
    tokenises the text up to there again, and runs the model on the rows that would then wait in the buffer. A forward
    pass gets the same contexts wherever reading began, so a resumed run is the same bit for bit if the machine repeats
    a pass exactly. With a filter of norms the model runs on all rows up to there, because only it knows which of them
    count. Rows wait in `dtype`, as in a store, on the model's device, in at most `memory_bytes`.
    Raises: LiveError when the text has no training rows, or a row is not finite in `dtype`.
    """

    def __init__(
        self,
        contexts: Contexts,
        hooks: dict[str, str],
        *,
        batch_tokens: int,
        seed: int,
        steps: int,
        memory_bytes: int = 1 << 30,
        dtype: str = "float16",
        downstream: Downstream | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise LiveError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
        self._contexts, self._hooks, self._dtype, self.downstream = contexts, hooks, DTYPES[dtype], downstream
        self._widths = {role: contexts.model.hook_width(hook) for role, hook in hooks.items()}
        largest = contexts.row_filter.max_norms
        self._largest = {role: largest[hook] for role, hook in hooks.items() if role != "resid" and hook in largest}
        self.d_in = self._widths["x"]
        self.d_out = self._widths.get("y", self.d_in)
        held = memory_bytes // (sum(self._widths.values()) * self._dtype.itemsize)
        batches = min(2 * held // batch_tokens - 1, int(steps * SPREAD_SHARE), batch_tokens)
        self.plan = ShufflePlan(batch_tokens, max(1, batches), seed)
        self._buffer: ShuffleBuffer | None = None

    def batch(self, step: int) -> Batch:
        if self._buffer is None or self._buffer.batch != step:
            start = self.plan.first_row(self.plan.first_block(step))
            self._buffer = None  # free its memory before the next one is made
            self._buffer = ShuffleBuffer(self.plan, step, self._rows_from(start))
        found = self._by_role(self._buffer.take())
        return Batch(found["x"], found.get("y"), found.get("resid"))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        """n rows (or all, if there are fewer) drawn uniformly from the first 4 n of the text, which is shuffled."""
        return self._by_role(self._drawn(n, seed))["x"].cpu()

    def sample_targets(self, n: int, seed: int) -> Float[Tensor, "n d_out"]:
        """y of the rows that `sample` draws."""
        return self._by_role(self._drawn(n, seed))["y"].cpu()

    def mixing(self, batches: int = 8) -> float:
        """Distinct contexts in a batch, as a share of those in a batch drawn uniformly from the text (1: as good)."""
        kept = [n for _, keep in self._contexts.epoch() for n in keep.sum(1).tolist()]
        rows = np.repeat(np.arange(len(kept)), kept)
        plan = self.plan
        first = plan.first_block(plan.batches)
        start, end = plan.first_row(first), plan.first_row(plan.batches + batches)
        context = torch.from_numpy(rows[np.arange(start, end) % len(rows)])[:, None]
        buffer = ShuffleBuffer(plan, plan.batches, [context])
        found = [len(torch.unique(buffer.take())) for _ in range(batches)]
        perfect = sum(1 - (1 - min(1.0, plan.batch_rows / len(rows))) ** n for n in kept)
        return float(np.mean(found) / perfect)

    def _by_role(self, rows: Tensor) -> dict[str, Tensor]:
        parts = torch.split(rows, list(self._widths.values()), dim=1)
        return {role: part.float() for role, part in zip(self._widths, parts, strict=True)}

    def _drawn(self, n: int, seed: int) -> Float[Tensor, "n width"]:
        """The n rows with the smallest random keys, so that the text may be shorter than what is to be drawn from."""
        rng = np.random.default_rng((seed, SAMPLE_STREAM))
        parts: list[Tensor] = []
        keys, left = np.empty(0), SAMPLED_FROM * n
        for tokens, keep in self._contexts.epoch():
            parts.append(self._forward(tokens, keep)[:left])
            keys = np.concatenate([keys, rng.random(len(parts[-1]))])
            left -= len(parts[-1])
            if len(keys) > 2 * n or not left:
                smallest = np.argsort(keys, kind="stable")[:n]
                parts, keys = [torch.cat(parts)[torch.from_numpy(smallest)]], keys[smallest]
            if not left:
                break
        if not len(keys):
            self._refuse_empty()
        return torch.cat(parts)[torch.from_numpy(np.argsort(keys, kind="stable")[:n])]

    def _rows_from(self, start: int) -> Iterator[Float[Tensor, "n width"]]:
        """Kept rows of the text, epoch after epoch, from row `start` on, one forward pass at a time."""
        begin = 0
        while True:
            end = begin
            for tokens, keep in self._contexts.epoch():
                rows = self._forward(tokens, keep) if self._largest else None
                first, end = end, end + (int(keep.sum()) if rows is None else len(rows))
                if end > start:
                    yield (self._forward(tokens, keep) if rows is None else rows)[max(0, start - first) :]
            if end == begin:
                self._refuse_empty()
            begin = end + max(0, start - end) // (end - begin) * (end - begin)  # skips whole epochs

    def _forward(self, tokens: np.ndarray, keep: np.ndarray) -> Float[Tensor, "n width"]:
        model, hooks = self._contexts.model, self._hooks.values()
        # The dictionary's steps may use other matrix products; the model uses PyTorch's default, as in a harvest.
        with model.lock, matmul.using("highest"):
            found = model.capture_all(
                torch.from_numpy(tokens.astype(np.int64)), list(dict.fromkeys(self._hooks.values()))
            )
        wide = [found[hook].flatten(0, 1) for hook in self._hooks.values()]
        rows = (wide[0] if len(wide) == 1 else torch.cat(wide, 1))[torch.from_numpy(keep.reshape(-1)).to(model.device)]
        for role, largest in self._largest.items():
            rows = rows[~(self._by_role(rows)[role].norm(dim=-1) > largest)]  # NaN stays, to be refused below
        rows = rows.to(self._dtype)
        if not rows.isfinite().all():
            raise LiveError(
                f"{model.id}: activations at {', '.join(hooks)} are not finite in {self._dtype}. From "
                "Python use sae.Live(…, dtype='float32'), or harvest with --dtype float32 and train on the store."
            )
        return rows

    @property
    def _of_lane(self) -> str:
        lane, lanes = self._contexts.lane, self._contexts.lanes
        return f" in lane {lane} of {lanes} (row_lanes)" if lanes > 1 else ""

    def _refuse_empty(self) -> None:
        raise LiveError(
            f"{self._contexts.source.name} has no training text{self._of_lane}: short documents are held out whole, "
            "one in twenty, by their hash, and these all are. Give more documents."
        )


class LiveLanes:
    """Batches with equally many rows of each of `lanes` lanes, which do not depend on the number of ranks.

    `lane_named(i)` gives the rows of lane i: those of its own documents, epoch after epoch, in an order of its own.
    Rank r of `mesh` has the lanes r · lanes / world and following, and runs the model on no others. A lane whose text
    ends begins it again, whatever the others do. A sample has equally many rows of each lane; the ranks put their parts
    together.
    """

    def __init__(self, lane_named: Callable[[int], LiveRows], lanes: int, mesh: Mesh = ONE) -> None:
        assert lanes % mesh.world == 0
        self._lane_named, self.lanes, self._mesh = lane_named, lanes, mesh
        self._own = range(mesh.rank * lanes // mesh.world, (mesh.rank + 1) * lanes // mesh.world)
        self._rows = [lane_named(lane) for lane in self._own]
        self.samples_together = mesh.world > 1
        first = self._rows[0]
        self.d_in, self.d_out, self.plan, self.downstream = first.d_in, first.d_out, first.plan, first.downstream

    def on(self, mesh: Mesh) -> LiveLanes:
        """The rows of this rank of a mesh."""
        return LiveLanes(self._lane_named, self.lanes, mesh)

    def batch(self, step: int) -> Batch:
        x, y, resid, _ = zip(*(rows.batch(step) for rows in self._rows), strict=True)
        return Batch(torch.cat(x), _joined(y), _joined(resid))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        return self._together([rows.sample(wanted, seed) for rows, wanted in self._shares(n)], self.d_in)

    def sample_targets(self, n: int, seed: int) -> Float[Tensor, "n d_out"]:
        """y of the rows that `sample` draws."""
        return self._together([rows.sample_targets(wanted, seed) for rows, wanted in self._shares(n)], self.d_out)

    def _shares(self, n: int) -> list[tuple[LiveRows, int]]:
        """The own lanes that a sample of n rows reads, each with the number of its rows."""
        wanted = [n * (lane + 1) // self.lanes - n * lane // self.lanes for lane in self._own]
        return [(rows, share) for rows, share in zip(self._rows, wanted, strict=True) if share]

    def _together(self, drawn: Sequence[Tensor], width: int) -> Tensor:
        own = torch.cat([torch.empty(0, width), *drawn])
        return self._mesh.joined(own, self._mesh.everyones(len(own)))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None
