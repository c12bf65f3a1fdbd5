"""The ablation effect on the examples of a page: in closed form in a one-layer model, else by a second forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from browser.data import Example
from browser.live import Live
from store.features import FeatureIndex

CONTEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class Effect:
    """What removing the feature does to the prediction of one token.

    `loss`: −log p with the feature, in nats (None: unknown). `change`: loss without the feature − loss with it; above
    zero the feature helps. `raised`, `lowered`: (token id, change of its logit).
    """

    loss: float | None
    change: float
    raised: list[tuple[int, float]]
    lowered: list[tuple[int, float]]


@dataclass
class Effects:
    """Effects by (context, position of the predicted token); `exact` if in closed form."""

    at: dict[tuple[int, int], Effect] = field(default_factory=dict)
    exact: bool = True
    seconds: float = 0.0


def effects(
    live: Live,
    index: FeatureIndex,
    feature: int,
    rows: np.ndarray,
    values: np.ndarray,
    examples: Sequence[Example],
    *,
    hook_point: str,
    tick: Callable[[], object] = lambda: None,
) -> Effects:
    """The effect of `feature`, which fires on `rows` with `values`, on every token of `examples`.

    `tick` is called between batches, so that Streamlit can interrupt the run when the user leaves the page.
    """
    import torch

    from sae.interventions.ablation import ablate, has_closed_form

    started = time.monotonic()
    found = Effects(exact=has_closed_form(live.model, hook_point))
    wanted: dict[int, list[Example]] = {}
    for example in examples:
        wanted.setdefault(example.context, []).append(example)
    end = {context: max(e.start + len(e.token_ids) for e in shown) for context, shown in wanted.items()}
    order = sorted(wanted, key=end.__getitem__)  # contexts of similar length run together
    for start in range(0, len(order), CONTEXTS_AT_ONCE):
        tick()
        batch = order[start : start + CONTEXTS_AT_ONCE]
        length = end[batch[-1]]
        tokens = np.stack([index.tokens_at(context)[:length] for context in batch]).astype(np.int64)
        acts, shown = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, bool)
        for i, context in enumerate(batch):
            first = context * index.seq_len
            lo, hi = np.searchsorted(rows, [first, first + length])
            acts[i, rows[lo:hi] - first] = values[lo:hi]
            for example in wanted[context]:
                shown[i, example.start : example.start + len(example.token_ids)] = True
        with live.model.lock:
            changed = ablate(
                live.model,
                live.sae.W_dec[feature],
                torch.from_numpy(tokens),
                torch.from_numpy(acts),
                hook_point,
                shown=torch.from_numpy(shown),
            )
        columns = [column.tolist() for column in changed]
        for context, position, loss, ablated, up_ids, up, down_ids, down in zip(*columns, strict=True):
            found.at[batch[context], position] = Effect(
                loss, ablated - loss, list(zip(up_ids, up, strict=True)), list(zip(down_ids, down, strict=True))
            )
    found.seconds = time.monotonic() - started
    return found
