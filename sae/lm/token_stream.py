"""Batches of pretraining: contexts cut from one long array of tokens, some of them replaced by repeated segments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Repeats:
    """A share of contexts that hold one segment of text over and over, of a length between `shortest` and `longest`.

    Such contexts make a model predict by what followed an earlier copy of a token, so that induction heads form early.
    """

    share: float = 0.0
    shortest: int = 12
    longest: int = 64


class TokenStream:
    """All tokens of a split in one array; every epoch cuts it into contexts at another seeded offset.

    With `bos_id` each context begins with that token, in the place of its own first one. `starts` are the places where
    documents begin in `tokens`, and `document_share` of the contexts begin there instead of anywhere.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        context_tokens: int,
        batch_contexts: int,
        seed: int,
        *,
        repeats: Repeats | None = None,
        bos_id: int | None = None,
        document_share: float = 0.0,
        starts: Int[np.ndarray, " documents"] | None = None,
    ) -> None:
        self.tokens, self.context_tokens, self.seed = tokens, context_tokens, seed
        self.document_share, self.starts = document_share, starts
        self.batch_contexts = batch_contexts
        self.repeats, self.bos_id = repeats or Repeats(), bos_id
        contexts = (len(tokens) - context_tokens) // (context_tokens + 1)
        self.steps_per_epoch = contexts // batch_contexts
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"pretrain: the text has {len(tokens):,} tokens, too few for one batch of {batch_contexts} contexts "
                f"of {context_tokens} tokens. Give more text or fewer contexts per batch."
            )
        self._epoch = -1

    def batch(self, step: int) -> Int[Tensor, "batch pos"]:
        """Contexts of `context_tokens` + 1 tokens; a pure function of (seed, step)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            width = self.context_tokens + 1
            offset = int(rng.integers(self.context_tokens))
            self._starts = offset + width * rng.permutation(self.steps_per_epoch * self.batch_contexts)
            self._epoch = epoch
        starts = self._starts[index * self.batch_contexts : (index + 1) * self.batch_contexts]
        if self.document_share and self.starts is not None:
            starts = self._at_documents(starts, self.starts, step)
        rows = np.stack([self.tokens[s : s + self.context_tokens + 1] for s in starts])
        if self.repeats.share:
            self._plant_repeats(rows, step)
        if self.bos_id is not None:
            rows[:, 0] = self.bos_id
        return torch.from_numpy(rows.astype(np.int64))

    def _at_documents(
        self, places: Int[np.ndarray, " batch"], starts: Int[np.ndarray, " documents"], step: int
    ) -> Int[np.ndarray, " batch"]:
        """Some places moved back to the start of the document that they are in."""
        rng = np.random.default_rng((self.seed, step, 2))
        own = starts[np.maximum(np.searchsorted(starts, places, side="right") - 1, 0)]
        return np.where(rng.random(len(places)) < self.document_share, np.minimum(own, places), places)

    def _plant_repeats(self, rows: np.ndarray, step: int) -> None:
        """Replaces some rows: their first token stays, and a segment from anywhere in the text fills the rest."""
        rng = np.random.default_rng((self.seed, step, 1))
        for row in np.flatnonzero(rng.random(len(rows)) < self.repeats.share):
            length = int(rng.integers(self.repeats.shortest, self.repeats.longest + 1))
            start = int(rng.integers(len(self.tokens) - length))
            rows[row, 1:] = np.resize(self.tokens[start : start + length], self.context_tokens)
