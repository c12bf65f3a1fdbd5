"""What attention heads do in a forward pass: where they look on made-up and on real text, and what breaks without them.

Scores of patterns need no weights, so they work for every model that shows its attention.
Source: Olsson et al. 2022, "In-context Learning and Induction Heads", the head evaluators of its appendix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.lm import LanguageModel, ModelError
from sae.lm.base import Splice

Replacement = Literal["mean", "zero"]
LEFT_OUT = 0.1  # share of the vocabulary at each end of the frequencies that made-up text avoids


class Scores(NamedTuple):
    """A score of each head in each text: average over the first axis for a value, take its spread for an interval."""

    values: Float[Tensor, "texts layer head"]

    @property
    def mean(self) -> Float[Tensor, "layer head"]:
        found: Tensor = self.values.double().mean(0)
        return found


# --- made-up text ----------------------------------------------------------------------------------------------------


def ordinary_tokens(model: LanguageModel, tokens: Int[Tensor, "contexts pos"] | None = None) -> Int[Tensor, " n"]:
    """Tokens that are neither among the commonest nor among the rarest tenth of the vocabulary in a text.

    Without a text: all but special tokens and BOS.
    """
    ids = model.token_ids
    if tokens is not None:
        counts = torch.bincount(tokens.flatten(), minlength=int(ids.max()) + 1)[ids]
        cut = int(len(ids) * LEFT_OUT)
        ids = ids[counts.argsort(descending=True, stable=True)[cut : len(ids) - cut]]
    special = {model.bos_id, *(i for i, token in model.tokenizer.get_added_tokens_decoder().items() if token.special)}
    return ids[[int(i) not in special for i in ids]]


def repeated_tokens(
    pool: Int[Tensor, " n"], *, length: int, copies: int, texts: int, bos_id: int | None, seed: int = 0
) -> Int[Tensor, "texts pos"]:
    """BOS (if there is one), then `length` different random tokens, `copies` times over.

    Raises: ValueError if the pool has fewer tokens than `length`.
    """
    if len(pool) < length:
        raise ValueError(f"heads: {len(pool):,} tokens to draw from, too few for {length} different ones.")
    generator = torch.Generator().manual_seed(seed)
    rows = [pool[torch.randperm(len(pool), generator=generator)[:length]].repeat(copies) for _ in range(texts)]
    first = [] if bos_id is None else [torch.full((texts, 1), bos_id)]
    return torch.cat([*first, torch.stack(rows)], 1)


# --- patterns --------------------------------------------------------------------------------------------------------


def patterns(model: LanguageModel, tokens: Int[Tensor, "texts pos"]) -> Float[Tensor, "texts layer head dst src"]:
    """Attention patterns, one text at a time. Raises: ModelError if the model does not show them."""
    found = [[model.attention(row[None], layer).pattern.cpu() for layer in range(model.n_layers)] for row in tokens]
    return torch.stack([torch.stack(layers) for layers in found])


def after_earlier_copy(tokens: Int[Tensor, "texts pos"]) -> Bool[Tensor, "texts dst src"]:
    """Whether the token before `src` is an earlier copy of the token at `dst`: what an induction head attends to."""
    same = tokens[:, :, None] == tokens[:, None, :]
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    return after.tril(-1)


def attention_on(
    pattern: Float[Tensor, "texts layer head dst src"], cells: Bool[Tensor, "texts dst src"]
) -> Float[Tensor, "texts layer head"]:
    """Mean, over the destinations that have such cells, of the attention that goes to them."""
    wanted = cells.any(-1)
    mass = (pattern * cells[:, None, None]).sum(-1)
    found: Tensor = (mass * wanted[:, None, None]).sum(-1) / wanted.sum(-1)[:, None, None].clamp_min(1)
    return found


def prefix_matching(model: LanguageModel, repeated: Int[Tensor, "texts pos"]) -> Scores:
    """Attention to the token after an earlier copy of the current one, mean over tokens that have an earlier copy.

    Source: Olsson et al. 2022, "Prefix matching" (with its erratum: the token after the copy, not before).
    """
    return Scores(attention_on(patterns(model, repeated), after_earlier_copy(repeated)))


def same_cells_without_repeats(
    model: LanguageModel, repeated: Int[Tensor, "texts pos"], unrepeated: Int[Tensor, "texts pos"]
) -> Scores:
    """The control of `prefix_matching`: attention at the same places of texts in which no token comes twice."""
    assert repeated.shape == unrepeated.shape
    return Scores(attention_on(patterns(model, unrepeated), after_earlier_copy(repeated)))


def previous_token(model: LanguageModel, tokens: Int[Tensor, "texts pos"]) -> tuple[Scores, Scores]:
    """Mean attention to the token before, and to the first position; BOS, a resting place, is not counted as before.

    mean over i ≥ 2 of A[i, i − 1],    mean over i ≥ 2 of A[i, 0]
    """
    found = patterns(model, tokens)
    before = found.diagonal(-1, -2, -1)[..., 1:].mean(-1)
    return Scores(before), Scores(found[..., 2:, 0].mean(-1))


# --- copying ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def copying(model: LanguageModel, unrepeated: Int[Tensor, "texts pos"]) -> Scores:
    """How much of what a head raises are tokens that it could read: 1 if it raises only those, 0 by chance.

    On n different random tokens after BOS: the head's output through the final norm (at its scale) and W_U gives a
    change of each of the n tokens' logits; minus their mean, negative ones set to 0. Of the sum, the share on tokens up
    to the destination, mean over the first n − 1 destinations (half of all by chance), times 2 minus 1.
    Source: after Olsson et al. 2022, "Copying". Needs the weights (`LanguageModel.weights`).
    """
    weights, n = model.weights(), unrepeated.shape[1] - 1
    if model.bos_id is None:
        raise ModelError(f"{model.id} has no BOS, which the copying score puts in front of its made-up text.")
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    points = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)]
    norm = weights.ln_final.norm
    folded = norm.transposed(weights.W_U.T).T
    readable = torch.ones(n, n, dtype=torch.bool).tril()[:-1]
    found = []
    for row in unrepeated:
        streams = model.capture_all(row[None], [*points, last])
        scale = norm.scale(streams[last][0, 1:])
        columns = folded[:, row[1:]]
        layers = []
        for point, layer in zip(points, weights.layers, strict=True):
            z = streams[point][0, 1:].view(n, weights.n_heads, -1)
            raised = torch.einsum("phd,hdm,mt->hpt", z, layer.attn.W_O, columns) / scale
            raised = (raised - raised.mean(-1, keepdim=True)).clamp_min(0)[:, :-1]
            share = (raised * readable).sum(-1) / raised.sum(-1).clamp_min(1e-12)
            layers.append(2 * share.mean(-1) - 1)
        found.append(torch.stack(layers))
    return Scores(torch.stack(found).cpu())


# --- ablation --------------------------------------------------------------------------------------------------------


class Ablated(NamedTuple):
    """Loss of the second copy of a repeated text (nats, mean over its tokens) with each head replaced, and without.

    `first` and `first_clean` are the same for the first copy, where no head can predict by repetition.
    """

    second: Float[Tensor, "texts layer head"]
    first: Float[Tensor, "texts layer head"]
    second_clean: Float[Tensor, " texts"]
    first_clean: Float[Tensor, " texts"]


@torch.inference_mode()
def ablate_heads(
    model: LanguageModel,
    repeated_twice: Int[Tensor, "texts pos"],
    replacement: Replacement,
    *,
    means: Sequence[Float[Tensor, " width"]] | None = None,
) -> Ablated:
    """Replaces one head's output z at all positions, by zero or by its mean over a text, and measures the loss.

    `repeated_twice` is BOS and n tokens, twice; `means` the mean of hook_z per layer (`mean_outputs`). Ablation is of
    everything that the head does: what later heads make of it, too (Olsson et al. 2022, "full ablation").
    """
    if (replacement == "mean") != (means is not None):
        raise ValueError("heads: mean ablation needs the means of the heads' outputs, zero ablation takes none.")
    n = (repeated_twice.shape[1] - 1) // 2
    clean = copy_losses(model, repeated_twice, n)
    found = torch.empty(len(repeated_twice), model.n_layers, model.n_heads, 2)
    for layer in range(model.n_layers):
        point = f"blocks.{layer}.attn.hook_z"
        width = model.hook_width(point) // model.n_heads
        for head in range(model.n_heads):
            value = 0.0 if means is None else means[layer][head * width : (head + 1) * width]
            splice = _set_columns(slice(head * width, (head + 1) * width), value)
            found[:, layer, head] = copy_losses(model, repeated_twice, n, point, splice)
    return Ablated(found[..., 1], found[..., 0], clean[:, 1], clean[:, 0])


def copy_losses(
    model: LanguageModel,
    repeated_twice: Int[Tensor, "texts pos"],
    n: int,
    hook_point: str | None = None,
    splice: Splice | None = None,
) -> Float[Tensor, "texts copy"]:
    """Mean loss of the first and of the second copy of n tokens.

    The first token of the second copy, which nothing foretells, is in neither.
    """
    losses = model.token_losses(repeated_twice, hook_point, splice).cpu()  # of tokens 1 …
    return torch.stack([losses[:, 1:n].mean(1), losses[:, n + 1 :].mean(1)], 1)


def mean_outputs(model: LanguageModel, tokens: Int[Tensor, "texts pos"]) -> list[Float[Tensor, " width"]]:
    """Mean of each layer's hook_z over a text, without the first position."""
    return [model.capture(tokens, f"blocks.{n}.attn.hook_z")[:, 1:].mean((0, 1)) for n in range(model.n_layers)]


def _set_columns(columns: slice, value: Tensor | float) -> Callable[[Tensor], Tensor]:
    def splice(z: Tensor) -> Tensor:
        z = z.clone()
        z[..., columns] = value
        return z

    return splice
