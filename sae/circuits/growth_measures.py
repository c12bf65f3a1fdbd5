"""The measures of the lens `growth`: a model's snapshots on the same contexts, with a control beside each curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.circuits import growth, heads
from sae.circuits.growth import Window
from sae.circuits.head_measures import COPIES, LENGTH, LONG, Texts, made_up_text
from sae.circuits.intervals import mean_interval
from sae.circuits.results import Control, Measure
from sae.lm import LanguageModel

PCA_CONTEXTS = 48


class Snapshot(NamedTuple):
    """A model after so many tokens of training; `open` loads it, so that one is in memory at a time."""

    tokens: int
    open: Callable[[], LanguageModel]


class _Seen(NamedTuple):
    """What one snapshot gives."""

    losses: Float[Tensor, "contexts next"]
    shuffled: Float[Tensor, "contexts next"]
    prefix: Float[Tensor, "texts layer head"]
    no_repeats: Float[Tensor, "texts layer head"]
    copies: Float[Tensor, "texts copy"]


def growth_measures(
    snapshots: Sequence[Snapshot], held_out: Int[Tensor, "contexts pos"], *, made_up: int = 10, seed: int = 0
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """Curves over snapshots; and labels: token counts, and between which of them in-context learning grew most.

    Every snapshot sees the same contexts and the same made-up text, so that differences between snapshots are paired.
    Raises: ValueError for fewer than three snapshots, or contexts too short for the windows.
    """
    if len(snapshots) < 3:
        raise ValueError(f"growth: {len(snapshots)} snapshots; at least 3 are needed. Train with --keep-at.")
    window = window_for(held_out.shape[1])
    seen = [_look(snapshot.open(), held_out, window, made_up, seed) for snapshot in snapshots]
    learned = torch.stack([growth.in_context_learning(each.losses, window) for each in seen], 1)  # [contexts, snapshot]
    measures = {
        "loss": _loss(seen),
        "in_context_learning": _in_context_learning(seen, learned, window),
        "prefix_matching": _prefix(seen),
        "repeat_loss": _repeats(seen),
        **_gains(seen, held_out),
        **_path(seen, seed),
    }
    jump = _largest_growth(learned)
    tokens = [snapshot.tokens for snapshot in snapshots]
    return measures, {
        "snapshot": [f"{each / 1e6:.2f}M tokens" for each in tokens],
        "tokens": tokens,
        "largest_growth_between": tokens[jump : jump + 2],
        "windows": window._asdict(),
    }


def window_for(context_tokens: int) -> Window:
    """Losses around tokens 50 and 244 where contexts are long enough, else around a fifth and the end of them."""
    usual = Window()
    if context_tokens >= usual.late + growth.HALF_WINDOW:
        return usual
    early = max(growth.HALF_WINDOW + 1, context_tokens // 5)
    return Window(early, context_tokens - growth.HALF_WINDOW)


def _look(
    model: LanguageModel, held_out: Int[Tensor, "contexts pos"], window: Window, made_up: int, seed: int
) -> _Seen:
    texts = Texts(held_out, held_out)
    repeated, twice = (
        made_up_text(model, texts, length, copies, made_up, seed) for length, copies in ((LENGTH, COPIES), (LONG, 2))
    )
    plain = made_up_text(model, texts, repeated.shape[1] - (model.bos_id is not None), 1, made_up, seed)
    return _Seen(
        growth.context_losses(model, held_out),
        growth.context_losses(model, unordered(held_out, seed)),
        heads.prefix_matching(model, repeated).values,
        heads.same_cells_without_repeats(model, repeated, plain).values,
        heads.copy_losses(model, twice, (twice.shape[1] - 1) // 2),
    )


def unordered(tokens: Int[Tensor, "contexts pos"], seed: int) -> Int[Tensor, "contexts pos"]:
    """Each context with its tokens but the first in a random order: it tells only which tokens come."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens[:, 1:].shape, generator=generator).argsort(1)
    return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, order)], 1)


def _loss(seen: Sequence[_Seen]) -> Measure:
    mean = torch.stack([each.losses.double().mean(1) for each in seen], 1)
    shuffled = torch.stack([each.shuffled.double().mean(1) for each in seen], 1).mean(0)
    control = Control(shuffled, "the same contexts with their tokens in a random order")
    formula = "mean next-token loss (nats)"
    return Measure(
        mean.mean(0), len(mean), "contexts", formula, {"random_order": control}, mean_interval(mean), ("snapshot",)
    )


def _in_context_learning(seen: Sequence[_Seen], learned: Float[Tensor, "contexts snapshot"], window: Window) -> Measure:
    shuffled = torch.stack([growth.in_context_learning(each.shuffled, window) for each in seen], 1)
    controls = {
        "random_order": Control(
            shuffled.double().mean(0), "the same contexts with their tokens in a random order", mean_interval(shuffled)
        )
    }
    half = growth.HALF_WINDOW
    formula = f"loss of tokens {window.late} ± {half} minus loss of tokens {window.early} ± {half} (nats)"
    return Measure(
        learned.double().mean(0), len(learned), "contexts", formula, controls, mean_interval(learned), ("snapshot",)
    )


def _prefix(seen: Sequence[_Seen]) -> Measure:
    """The best head of each snapshot, and the best head at the same places of unrepeated text."""
    best, control = (
        torch.stack([values.double().flatten(1)[:, values.double().mean(0).argmax()] for values in column], 1)
        for column in ([each.prefix for each in seen], [each.no_repeats for each in seen])
    )
    formula = "largest over heads of the mean attention to the token after an earlier copy of the current one"
    controls = {"no_repeats": Control(control.mean(0), "the same places of text in which no token comes twice")}
    return Measure(best.mean(0), len(best), "texts", formula, controls, mean_interval(best), ("snapshot",))


def _repeats(seen: Sequence[_Seen]) -> Measure:
    copies = torch.stack([each.copies.double() for each in seen], 1)  # [texts, snapshot, copy]
    control = Control(copies[..., 0].mean(0), "loss of the first copy")
    formula = "mean loss of the second of two copies of random tokens (nats)"
    second = copies[..., 1]
    return Measure(
        second.mean(0), len(second), "texts", formula, {"first_copy": control}, mean_interval(second), ("snapshot",)
    )


def _gains(seen: Sequence[_Seen], held_out: Int[Tensor, "contexts pos"]) -> dict[str, Measure]:
    """Who gains between consecutive snapshots, and as control the same targets with bigrams marked at random."""
    mask = growth.bigram_seen_before(held_out)
    order = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    found, control = [], []
    for before, after in zip(seen[:-1], seen[1:], strict=True):
        found.append(growth.gains(before.losses, after.losses, mask))
        control.append(growth.gains(before.losses, after.losses, mask.gather(1, order)).seen_before)
    kept = ~torch.stack([gain.seen_before for gain in found], 1).isnan().any(1)
    by_chance = Control(torch.stack(control, 1)[kept].mean(0), "as many targets of each context, chosen at random")
    measures = {}
    for name, what in (("seen_before", "whose bigram came earlier in the context"), ("others", "of all other kinds")):
        values = torch.stack([getattr(gain, name) for gain in found], 1)[kept]
        measures[f"gain_{name}"] = Measure(
            values.mean(0),
            max(1, len(values)),
            "contexts",
            f"mean change of the loss of tokens {what}, from one snapshot to the next (nats)",
            {"random_targets": by_chance},
            mean_interval(values),
            ("step",),
        )
    return measures


def _path(seen: Sequence[_Seen], seed: int) -> dict[str, Measure]:
    vectors = torch.stack([each.losses[:PCA_CONTEXTS].flatten() for each in seen])
    path, control = growth.loss_path(vectors), growth.loss_path(growth.shuffled_snapshots(vectors, seed=seed))
    shuffled = "each token's losses in a random order of the snapshots"
    n = vectors.shape[1]
    return {
        "loss_path": Measure(
            path.points,
            n,
            "tokens",
            "first two principal components of the vectors of per-token losses",
            {"random_order": Control(control.points, shuffled)},
            None,
            ("snapshot", "component"),
        ),
        "loss_path_explained": Measure(
            path.explained,
            n,
            "tokens",
            "share of the variance of per-token losses between snapshots",
            {"random_order": Control(control.explained, shuffled)},
            None,
            ("component",),
        ),
    }


def _largest_growth(learned: Float[Tensor, "contexts snapshot"]) -> int:
    return int(learned.mean(0).diff().argmin())
