"""How a model came to compute what it does: measures over its snapshots, on the same contexts at each of them.

Source: Olsson et al. 2022, "In-context Learning and Induction Heads" (in-context learning score, per-token losses).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.lm import LanguageModel

HALF_WINDOW = 10


class Window(NamedTuple):
    """Two places in a context whose losses are compared, each a mean over 2 · 10 tokens around it."""

    early: int = 50
    late: int = 244


@torch.inference_mode()
def context_losses(
    model: LanguageModel, tokens: Int[Tensor, "contexts pos"], *, contexts_at_once: int = 32
) -> Float[Tensor, "contexts next"]:
    """Loss of each token but the first, in nats; column i is the loss of token i + 1."""
    return torch.cat([model.token_losses(chunk).cpu() for chunk in tokens.split(contexts_at_once)])  # type: ignore[no-untyped-call]


def in_context_learning(
    losses: Float[Tensor, "contexts next"], window: Window | None = None
) -> Float[Tensor, " contexts"]:
    """Loss late in the context minus loss early in it, per context: negative if more context helps.

        mean loss of tokens [late − 10, late + 10) − mean loss of tokens [early − 10, early + 10)

    Source: Olsson et al. 2022, "In-context learning score" (there single tokens, 500 and 50).
    Raises: ValueError for contexts that end before the late window does.
    """
    early, late = window or Window()
    if losses.shape[1] + 1 < late + HALF_WINDOW or early < HALF_WINDOW + 1:
        raise ValueError(
            f"growth: contexts of {losses.shape[1] + 1} tokens, too short for losses around tokens {early} and {late}."
        )
    around = [losses[:, place - HALF_WINDOW - 1 : place + HALF_WINDOW - 1].mean(1) for place in (early, late)]
    return around[1] - around[0]


def bigram_seen_before(tokens: Int[Tensor, "contexts pos"]) -> Bool[Tensor, "contexts next"]:
    """Whether the pair (token before, token) stood earlier in the context: what an induction head can predict.

    Column i belongs to token i + 1, as in `context_losses`.
    """
    pairs = tokens[:, :-1].long() << 32 | tokens[:, 1:].long()
    found = torch.zeros_like(pairs, dtype=torch.bool)
    for row, seen in zip(pairs, found, strict=True):
        order = row.argsort(stable=True)
        seen[order[1:]] = row[order][1:] == row[order][:-1]
    return found


class Gain(NamedTuple):
    """Mean change of the loss between two snapshots per context (nats): of repeated bigrams, and of all others.

    A context without tokens of a kind has nan.
    """

    seen_before: Float[Tensor, " contexts"]
    others: Float[Tensor, " contexts"]


def gains(
    before: Float[Tensor, "contexts next"], after: Float[Tensor, "contexts next"], seen: Bool[Tensor, "contexts next"]
) -> Gain:
    """Who gains between two snapshots: tokens whose bigram came earlier in the context, or others."""
    change = (after - before).double()

    def mean(mask: Tensor) -> Tensor:
        return (change * mask).sum(1) / mask.sum(1)

    return Gain(mean(seen), mean(~seen))


class Path(NamedTuple):
    """Snapshots as points of the plane in which their vectors of per-token losses differ most."""

    points: Float[Tensor, "snapshot 2"]
    explained: Float[Tensor, " 2"]  # share of the variance


def loss_path(losses: Float[Tensor, "snapshot tokens"]) -> Path:
    """Principal components of the vectors of per-token losses, one vector a snapshot.

    A bend of the path means that training turned to other tokens there. Source: Olsson et al. 2022, "Per-token loss
    analysis" (PCA of models' per-token losses). The sign of each component makes its largest entry positive.
    Raises: ValueError for fewer than three snapshots, which always lie in a plane.
    """
    if len(losses) < 3:
        raise ValueError(f"growth: {len(losses)} snapshots; a path of per-token losses needs at least 3.")
    x = losses.double()
    x = x - x.mean(0)
    squares, vectors = torch.linalg.eigh(x @ x.T)  # few snapshots, many tokens
    top = squares.argsort(descending=True)[:2]
    points = vectors[:, top] * squares[top].clamp_min(0).sqrt()
    signs = points.gather(0, points.abs().argmax(0, keepdim=True)).sign()
    return Path(points * torch.where(signs == 0, 1.0, signs), squares[top] / squares.sum().clamp_min(1e-300))


def shuffled_snapshots(losses: Float[Tensor, "snapshot tokens"], *, seed: int = 0) -> Float[Tensor, "snapshot tokens"]:
    """The control of `loss_path`: each token's losses in a random order of the snapshots."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(losses.shape, generator=generator).argsort(0)
    return losses.gather(0, order)
