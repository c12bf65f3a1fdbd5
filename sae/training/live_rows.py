"""Training rows from a model that runs while the dictionary trains: one process, a mixing buffer, nothing on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import matmul
from sae.lm import LanguageModel
from sae.text.packing import FORWARD_TOKENS, packed, tokenised
from sae.text.sources import TextSource
from sae.training.rows import Batch, Downstream
from sae.training.shuffle_buffer import MixingBuffer, Spread
from store.common import LANES, TRAIN

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SAMPLED_FROM = 4  # times the rows drawn
MIXED_SHARE = 1 / 4  # of a run, at most, is mixed with one another: filling the buffer then costs 1/8 of its rows
SAMPLE_STREAM = 1  # of random numbers, beside those that mix


class LiveError(ValueError):
    """The text or the model gives no rows to train on; the message says what to do."""


@dataclass(frozen=True)
class Contexts:
    """The training documents of a text in contexts: those that a harvest's store would hold, in the order they fill up.

    Document i goes to lane i mod 64, a lane's documents follow one another, each after a BOS; held-out documents are
    left out. Shapes: tokens and keep [n, seq_len], n as many as one forward pass takes.
    """

    model: LanguageModel
    source: TextSource
    seq_len: int

    def epoch(self) -> Iterator[tuple[Int[np.ndarray, "n seq_len"], np.ndarray]]:
        """Tokens and `keep`, pass after pass, of the whole text once."""
        filled = self._filled()
        while some := list(islice(filled, max(1, FORWARD_TOKENS // self.seq_len))):
            tokens, keep = zip(*some, strict=True)
            yield np.stack(tokens), np.stack(keep)

    def _filled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        waiting = [np.empty(0, np.uint32) for _ in range(LANES)]
        training = ((n, document) for n, document in enumerate(self.source.documents()) if document.split == TRAIN)
        for number, _, ids in tokenised(self.model, training):
            tokens = np.concatenate([waiting[number % LANES], ids])
            whole = len(tokens) - len(tokens) % self.seq_len
            waiting[number % LANES] = tokens[whole:]
            yield from zip(*packed(tokens[:whole], self.seq_len, self.model.bos_id), strict=True)
        for tokens in waiting:
            yield from zip(*packed(tokens, self.seq_len, self.model.bos_id), strict=True)


class LiveRows:
    """Rows of a model's activations on the training documents of a text, over and over, in mixed order.

    `hooks` says where x is read and, where a recipe asks for them, y and the residual stream ("x", "y", "resid").
    `batch(step)` is a pure function of (model, text, seed, step, `spread`); a step that does not follow the last one
    tokenises the text up to there again, and runs the model on what then waits in the buffer. A forward pass is on the
    same contexts wherever reading began, so a resumed run goes on bit for bit where the machine gives one pass one
    result. Rows wait in `dtype`, as a store keeps them, on the model's device, in at most `memory_bytes`.
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
        self.d_in = self._widths["x"]
        self.d_out = self._widths.get("y", self.d_in)
        held = memory_bytes // (sum(self._widths.values()) * self._dtype.itemsize)
        batches = min(2 * held // batch_tokens - 1, int(steps * MIXED_SHARE), batch_tokens)
        self.spread = Spread(batch_tokens, max(1, batches), seed)
        self._buffer: MixingBuffer | None = None

    def batch(self, step: int) -> Batch:
        if self._buffer is None or self._buffer.batch != step:
            start = self.spread.first_row(self.spread.first_block(step))
            self._buffer = None  # its memory goes before the next one's comes
            self._buffer = MixingBuffer(self.spread, step, self._rows_from(start))
        found = self._by_role(self._buffer.take())
        return Batch(found["x"], found.get("y"), found.get("resid"))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        """n rows (or all there are) drawn uniformly from the first 4 n of the text, whose documents are shuffled."""
        return self._by_role(self._drawn(n, seed))["x"].cpu()

    def sample_targets(self, n: int, seed: int) -> Float[Tensor, "n d_out"]:
        """y of the rows that `sample` draws."""
        return self._by_role(self._drawn(n, seed))["y"].cpu()

    def mixing(self, batches: int = 8) -> float:
        """Distinct contexts in a batch, as a share of those in a batch drawn uniformly from the text (1: no worse)."""
        kept = [n for _, keep in self._contexts.epoch() for n in keep.sum(1).tolist()]
        rows = np.repeat(np.arange(len(kept)), kept)
        spread, found = self.spread, []
        first = spread.first_block(spread.batches)
        start, end = spread.first_row(first), spread.first_row(spread.batches + batches)
        context = torch.from_numpy(rows[np.arange(start, end) % len(rows)])[:, None]
        buffer = MixingBuffer(spread, spread.batches, [context])
        found = [len(buffer.take().unique()) for _ in range(batches)]
        perfect = sum(1 - (1 - min(1.0, spread.batch_rows / len(rows))) ** n for n in kept)
        return float(np.mean(found)) / perfect

    def _by_role(self, rows: Tensor) -> dict[str, Tensor]:
        parts = rows.split(list(self._widths.values()), dim=1)
        return {role: part.float() for role, part in zip(self._widths, parts, strict=True)}

    def _drawn(self, n: int, seed: int) -> Float[Tensor, "n width"]:
        """Those with the smallest of random keys: the text may be shorter than what is to be drawn from."""
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
        """Kept rows of the text over and over, from the row `start` of these on, a forward pass at a time."""
        begin = 0
        while True:
            end = begin
            for tokens, keep in self._contexts.epoch():
                first, end = end, end + int(keep.sum())
                if end > start:
                    yield self._forward(tokens, keep)[max(0, start - first) :]
            if end == begin:
                self._refuse_empty()
            begin = end + max(0, start - end) // (end - begin) * (end - begin)  # epochs that need no reading

    def _forward(self, tokens: np.ndarray, keep: np.ndarray) -> Float[Tensor, "n width"]:
        model, hooks = self._contexts.model, self._hooks.values()
        # A step of the dictionary may want other products; the model's are PyTorch's, as in a harvest.
        with model.lock, matmul.using("highest"):
            found = model.capture_all(
                torch.from_numpy(tokens.astype(np.int64)), list(dict.fromkeys(self._hooks.values()))
            )
        wide = [found[hook].flatten(0, 1) for hook in self._hooks.values()]
        rows = (wide[0] if len(wide) == 1 else torch.cat(wide, 1))[torch.from_numpy(keep.reshape(-1)).to(model.device)]
        rows = rows.to(self._dtype)
        if not rows.isfinite().all():
            raise LiveError(
                f"{model.id}: activations at {', '.join(hooks)} are not finite in {self._dtype}. From "
                "Python, say sae.Live(…, dtype='float32'); or harvest with --dtype float32, and train on the store."
            )
        return rows

    def _refuse_empty(self) -> None:
        raise LiveError(
            f"{self._contexts.source.name} has no training text (held out are documents with blake2b(text) mod 20 == "
            "0). Give more documents."
        )
