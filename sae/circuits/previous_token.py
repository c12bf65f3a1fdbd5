"""Which units say "the token before was X", and how much of what induction heads see in their keys these units are.

A rule "the unit fires where the token before is X" is chosen for each unit on one text, with its threshold, and judged
on another: F1 of precision and recall. Induction heads attend to the token after an earlier copy of the current one, so
their keys must say what came before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.circuits.heads import after_earlier_copy
from sae.circuits.units import Units
from sae.lm import LanguageModel

DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)  # of a unit's own firings: the thresholds that are tried
LEAST_FIRINGS = 10
GOOD = 0.5


class Rules(NamedTuple):
    """For each unit: the token X of its best rule, its threshold, and the rule's F1 and firings on held-out text.

    F1 is nan for units with fewer than 10 firings there.
    """

    token: Int[Tensor, " unit"]
    threshold: Float[Tensor, " unit"]
    f1: Float[Tensor, " unit"]
    firings: Int[Tensor, " unit"]

    @property
    def judged(self) -> Bool[Tensor, " unit"]:
        return ~self.f1.isnan()

    @property
    def good_share(self) -> float:
        """Of the units with enough firings, the share whose rule has a held-out F1 of 0.5 or more."""
        return float((self.f1[self.judged] >= GOOD).double().mean()) if bool(self.judged.any()) else 0.0

    @property
    def good_tokens(self) -> list[int]:
        """Each X of the units whose rule has a held-out F1 of 0.5 or more, ascending."""
        return sorted({int(token) for token in self.token[self.judged & (self.f1 >= GOOD)]})

    def covered(self, labels: Int[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """The rows whose label is one of `good_tokens`."""
        return torch.isin(labels, torch.tensor(self.good_tokens, dtype=torch.long))


def rules_of(
    chosen_on: tuple[Float[Tensor, "row unit"], Int[Tensor, " row"]],
    judged_on: tuple[Float[Tensor, "held_out unit"], Int[Tensor, " held_out"]],
    n_labels: int,
) -> Rules:
    """The best rule "fires where the label is X" of each unit, chosen on the first text and judged on the second.

    Both are activations and, of each row, the label (the token before).
    """
    acts, labels = chosen_on
    best, token = torch.full((acts.shape[1],), -1.0), torch.zeros(acts.shape[1], dtype=torch.long)
    threshold = torch.zeros(acts.shape[1])
    order, own = acts.sort(0, descending=True).values, (acts > 0).sum(0)
    for density in DENSITIES:
        place = (
            (own.double() * density).long().clamp(0, len(acts) - 1)
        )  # at least `place` rows are above the value there
        level = torch.where(own > place, order.gather(0, place[None])[0], torch.zeros(()))
        level = level if density < 1 else torch.zeros_like(level)
        f1, where = _f1(acts > level, labels, n_labels).max(0)
        better = f1 > best
        best, token, threshold = (
            torch.where(better, new, old) for new, old in ((f1, best), (where, token), (level, threshold))
        )
    fires = judged_on[0] > threshold
    held_out = _f1(fires, judged_on[1], n_labels).gather(0, token[None])[0]
    firings = fires.sum(0)
    return Rules(token, threshold, held_out.masked_fill(firings < LEAST_FIRINGS, torch.nan), firings)


def _f1(fires: Bool[Tensor, "row unit"], labels: Int[Tensor, " row"], n_labels: int) -> Float[Tensor, "label unit"]:
    """2 · hits / (firings + rows with the label), of every label and unit."""
    hits = torch.zeros(n_labels, fires.shape[1]).index_add_(0, labels, fires.float())
    rows = torch.bincount(labels, minlength=n_labels)
    found: Tensor = 2 * hits / (fires.sum(0) + rows[:, None]).clamp_min(1)
    return found


class Keys(NamedTuple):
    """What one head of a later layer reads at each position, of all that is written and of some units; per text."""

    whole: Float[Tensor, "text pos d_head"]
    matched: Float[Tensor, "text pos d_head"]
    largest: list[Float[Tensor, "text pos d_head"]]  # of the k largest units, for each k
    all_units: Float[Tensor, "text pos d_head"]


@torch.inference_mode()
def keys_of(
    model: LanguageModel,
    tokens: Int[Tensor, "text pos"],
    head: tuple[int, int],
    units: Units,
    rule: Int[Tensor, " unit"],
    sizes: tuple[int, ...],
) -> Keys:
    """A head's key at each position, and what units write of it, the norm's scale held.

    `matched` are the units whose rule's X is the token before; `largest` the k units with the largest a · ‖written‖.
    """
    layer, number = head
    stream = f"blocks.{layer}.hook_resid_pre"
    caught = model.capture_all(tokens, [units.hook_point, stream])
    weights = model.weights().layers[layer]
    W_K = weights.attn.W_K[number]
    read = weights.ln1.norm.transposed(W_K.T).T  # [d_model, d_head]: centring and the norm's weight, not its scale
    x = caught[stream]
    whole = weights.ln1(x) @ W_K + weights.attn.b_K[number]
    acts, scale = units.acts(caught[units.hook_point]), weights.ln1.norm.scale(x)
    per_unit = units.written.to(x) @ read  # [unit, d_head]
    before = torch.full_like(tokens, -1)
    before[:, 1:] = tokens[:, :-1]
    mine = rule[None, None] == before[..., None]
    size = acts * units.written.norm(dim=-1).to(x)
    largest = []
    for k in sizes:
        kept = torch.zeros_like(acts).scatter(-1, size.topk(min(k, len(units)), -1).indices, 1.0)
        largest.append((acts * kept) @ per_unit / scale)
    return Keys(whole, (acts * mine) @ per_unit / scale, largest, acts @ per_unit / scale)


@torch.inference_mode()
def advantage(
    model: LanguageModel, tokens: Int[Tensor, "text pos"], head: tuple[int, int], key: Float[Tensor, "text pos d_head"]
) -> Float[Tensor, " text"]:
    """How much higher an induction head scores the token after an earlier copy than the others, by these keys alone.

        mean over destinations of (mean over those sources of q·k/√d_head − mean over the other earlier sources)

    BOS is no source. Softmax ignores what is added to all scores of a destination, so this difference is what attends.
    """
    layer, number = head
    d_head = key.shape[-1]
    q = model.capture(tokens, f"blocks.{layer}.attn.hook_q")[..., number * d_head : (number + 1) * d_head]
    scores = (q @ key.transpose(-1, -2)).double() / d_head**0.5
    wanted = after_earlier_copy(tokens)
    wanted[:, :, 0] = False
    others = torch.ones_like(wanted).tril(-1) & ~wanted
    others[:, :, 0] = False
    there = (wanted.any(-1) & others.any(-1)).double()

    def mean_over(cells: Bool[Tensor, "text dst src"]) -> Float[Tensor, "text dst"]:
        found: Tensor = (scores * cells).sum(-1) / cells.sum(-1).clamp_min(1)
        return found

    found: Tensor = ((mean_over(wanted) - mean_over(others)) * there).sum(-1) / there.sum(-1).clamp_min(1)
    return found
