"""Removing one feature from a text: how the prediction of each token changes.

In a one-layer model only the final norm and W_U read the MLP's output, so the effect has a closed form and needs no
second run. In other models the model is run again, which is the definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.lm import LanguageModel, NativeModel, Splice

LOGITS_AT_ONCE = 1 << 24  # numbers in one [rows, d_vocab] block


class Ablated(NamedTuple):
    """The predictions that change, one row each: of the token at `position` of `context`. Losses are in nats.

    `raised_ids` are the tokens whose logit the feature raises most there, `raised` by how much (logits − logits without
    the feature, with the median over the vocabulary at 0); `lowered` likewise.
    """

    context: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    loss: Float[Tensor, " n"]
    loss_ablated: Float[Tensor, " n"]
    raised_ids: Int[Tensor, "n k"]
    raised: Float[Tensor, "n k"]
    lowered_ids: Int[Tensor, "n k"]
    lowered: Float[Tensor, "n k"]


def only_final_norm_reads(model: LanguageModel, hook_point: str) -> bool:
    """Whether x at `hook_point` reaches the logits through the final norm and W_U alone: linear at the norm's scale."""
    return model.why_no_path(hook_point) is None and model.direct_path(hook_point).alone


def has_closed_form(model: LanguageModel, hook_point: str) -> bool:
    """Whether `ablate` needs no second run: `only_final_norm_reads`, in a native model."""
    return isinstance(model, NativeModel) and only_final_norm_reads(model, hook_point)


@torch.inference_mode()
def ablate(
    model: LanguageModel,
    direction: Float[Tensor, " d_in"],
    tokens: Int[Tensor, "contexts pos"],
    acts: Float[Tensor, "contexts pos"],
    hook_point: str,
    *,
    shown: Bool[Tensor, "contexts pos"] | None = None,
    top: int = 3,
    closed_form: bool | None = None,
) -> Ablated:
    """Predictions of the `shown` tokens (default: all) with `a(t) · direction` subtracted from x at every position t.

    Closed form: `logits' = W_U · LN(resid − a · r)`, r the direction in the residual stream; only the prediction made
    where the feature fires changes. Otherwise every prediction from a context's first firing on comes from a second run
    of the model. The feature helps where `loss_ablated − loss` > 0. `closed_form` overrides `has_closed_form`.
    Source: Bricken et al. 2023, "ablation".
    """
    if closed_form is None:
        closed_form = has_closed_form(model, hook_point)
    run = _closed_form if closed_form else _second_run
    mask = torch.ones_like(tokens, dtype=torch.bool) if shown is None else shown
    return run(model, direction, tokens.long(), acts.float(), hook_point, mask[:, 1:], top)


def _closed_form(
    model: LanguageModel,
    direction: Float[Tensor, " d_in"],
    tokens: Int[Tensor, "contexts pos"],
    acts: Float[Tensor, "contexts pos"],
    hook_point: str,
    wanted: Bool[Tensor, "contexts next"],
    top: int,
) -> Ablated:
    assert isinstance(model, NativeModel)
    context, position = torch.nonzero((acts[:, :-1] > 0) & wanted, as_tuple=True)
    resid, target = final_residual(model, tokens)[context, position], tokens[context, position + 1]
    act, written = acts[context, position], to_residual(model, direction, hook_point)
    parts = []
    at_once = max(1, LOGITS_AT_ONCE // model.d_vocab)
    for start in range(0, len(context), at_once):
        rows = slice(start, start + at_once)
        logits = read_out(model, resid[rows])
        ablated = read_out(model, resid[rows] - act[rows, None] * written)
        parts.append(_compare(model, context[rows], position[rows], target[rows], logits, ablated, top))
    return _joined(parts, top)


def final_residual(model: NativeModel, tokens: Int[Tensor, "contexts pos"]) -> Float[Tensor, "contexts pos d_model"]:
    """The residual stream that the final norm reads."""
    return model.capture(tokens, f"blocks.{model.module.config.n_layers - 1}.hook_resid_post")


def read_out(model: NativeModel, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """`W_U · LN(resid)`: the logits."""
    logits: Tensor = model.module.unembed(model.module.ln_final(resid))
    return logits


def to_residual(
    model: LanguageModel, directions: Float[Tensor, "*n d_in"], hook_point: str
) -> Float[Tensor, "*n d_model"]:
    """What directions at `hook_point` add to the residual stream."""
    return model.direct_path(hook_point).linear(directions)


def _second_run(
    model: LanguageModel,
    direction: Float[Tensor, " d_in"],
    tokens: Int[Tensor, "contexts pos"],
    acts: Float[Tensor, "contexts pos"],
    hook_point: str,
    wanted: Bool[Tensor, "contexts next"],
    top: int,
) -> Ablated:
    parts = []
    affected = ((acts > 0).cumsum(1) > 0)[:, :-1] & wanted
    at_once = max(1, LOGITS_AT_ONCE // (model.d_vocab * tokens.shape[1]))
    for start in range(0, len(tokens), at_once):
        rows = slice(start, start + at_once)
        if not affected[rows].any():
            continue
        logits = model.logits(tokens[rows])
        ablated = model.logits(tokens[rows], hook_point, _minus(acts[rows, :, None] * direction))
        context, position = torch.nonzero(affected[rows], as_tuple=True)
        target = tokens[rows][context, position + 1]
        before, after = (found[context, position].cpu() for found in (logits, ablated))
        parts.append(_compare(model, context + start, position, target, before, after, top))
    return _joined(parts, top)


def _minus(removed: Float[Tensor, "contexts pos d_in"]) -> Splice:
    return lambda x: x - removed.to(x.device)


def _compare(
    model: LanguageModel,
    context: Int[Tensor, " n"],
    position: Int[Tensor, " n"],
    target: Int[Tensor, " n"],
    logits: Float[Tensor, "n d_vocab"],
    ablated: Float[Tensor, "n d_vocab"],
    top: int,
) -> Ablated:
    """The changes of predictions made at `position`, of the tokens after it."""
    cross_entropy = torch.nn.functional.cross_entropy
    change = logits - ablated
    change = change - model.of_tokens(change).median(-1, keepdim=True).values
    raised, raised_ids = model.top_tokens(change, top)
    lowered, lowered_ids = model.top_tokens(change, top, largest=False)
    return Ablated(
        context,
        position + 1,
        cross_entropy(logits, target, reduction="none"),
        cross_entropy(ablated, target, reduction="none"),
        raised_ids,
        raised,
        lowered_ids,
        lowered,
    )


def _joined(parts: list[Ablated], top: int) -> Ablated:
    if not parts:
        none, ids, values = torch.zeros(0, dtype=torch.long), torch.zeros(0, top, dtype=torch.long), torch.zeros(0, top)
        return Ablated(none, none, torch.zeros(0), torch.zeros(0), ids, values, ids, values)
    return Ablated(*(torch.cat(column) for column in zip(*parts, strict=True)))
