"""The blocks of text that evaluation goes through, and what adds them up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.activations import SparseActs
from sae.parallel.mesh import Mesh

Ablated = dict[int, dict[str, Tensor]]  # by block number: losses that no dictionary changes (ablations, largest units)


class Block(NamedTuple):
    """Some whole contexts with their activations.

    `domain` is the number of each position's domain in the evaluation's list (-1: no domain of the list).
    `target` is y, for a transcoder. `skipped` holds the numbers of contexts of the blocks between this one and the one
    before it in the same process, which other ranks evaluate: random draws are then those of one process.
    """

    acts: Float[Tensor, "contexts pos d_in"]
    tokens: Int[Tensor, "contexts pos"]
    keep: Bool[Tensor, "contexts pos"]
    domain: Int[np.ndarray, "contexts pos"]
    target: Float[Tensor, "contexts pos d_out"] | None = None
    skipped: tuple[int, ...] = ()

    @property
    def wanted(self) -> Float[Tensor, "contexts pos d_out"]:
        """What the dictionary should reconstruct: x, or y for a transcoder."""
        return self.acts if self.target is None else self.target


@dataclass(frozen=True)
class Blocks:
    """Blocks that can be read several times: each time from a new iterator."""

    read: Callable[[], Iterator[Block]]

    def __iter__(self) -> Iterator[Block]:
        return self.read()


class EvaluatedBlock(NamedTuple):
    """A block with everything that was computed on it.

    `fired`: the activations above zero on kept tokens. `losses`: `ce_clean`, `ce_<replacement>` and `kl` in nats, at
    the position that makes the prediction.
    """

    block: Block
    fired: SparseActs
    x_hat: Float[Tensor, "contexts pos d_out"]
    losses: dict[str, Float[Tensor, "contexts pos"]]


@runtime_checkable
class Accumulator(Protocol):
    """Adds up blocks and gives its part of eval.json: sections by name (`metrics`, `by_domain`, …).

    Accumulators may share a section; their entries are then joined. To add a metric that is not a ratio of sums over
    tokens (such ratios are in `metrics.METRICS`), write an accumulator and list it in `evaluate.evaluate`.
    """

    def add(self, evaluated: EvaluatedBlock) -> None: ...

    def gather(self, mesh: Mesh) -> None:
        """Takes in, on rank 0, what the other ranks added: block i of a rank is block i · world + rank of the text."""
        ...

    def result(self) -> dict[str, Any]: ...
