"""One prompt under a dictionary: what fires on each token, what its reconstruction loses, what pushes a next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE, refuse_row_scale, refuse_transcoder
from sae.dictionary.row_norm import restored
from sae.dictionary.sites import refuse_crosscoder
from sae.dictionary.trained_rows import rows_that_count
from sae.interventions.ablation import only_final_norm_reads
from sae.lm import LanguageModel


class Inspection(NamedTuple):
    """A prompt token by token. `positions`, `features` and `acts` belong together: one entry for each active feature.

    `error[t]` is ‖x − x̂‖² / ‖x − b‖², b the input bias: the share that the dictionary leaves unexplained.
    `loss[t]` and `loss_spliced[t]` are the loss of token t given the tokens before it, in nats: without and with x̂ in
    place of x where the dictionary was trained: at every position but BOS and what its row filter leaves out. The first
    token has none (nan).
    """

    ids: list[int]
    positions: Int[Tensor, " nnz"]
    features: Int[Tensor, " nnz"]
    acts: Float[Tensor, " nnz"]
    error: Float[Tensor, " pos"]
    loss: Float[Tensor, " pos"]
    loss_spliced: Float[Tensor, " pos"]


@torch.inference_mode()
def inspect(model: LanguageModel, sae: SAE, ids: Sequence[int], *, hook_point: str) -> Inspection:
    """Encodes one prompt and splices its reconstruction in. Active features are sorted by position, then number.

    Raises: ValueError for a transcoder.
    """
    refuse_crosscoder(sae, "microscope")
    refuse_transcoder(sae, "microscope")
    tokens = torch.tensor([list(ids)])
    with model.lock:
        x = model.capture(tokens, hook_point)[0].cpu()
        kept = rows_that_count(sae, model.bos_id, tokens[0], x, hook_point)
        x_hat = sae(x)
        loss = model.token_losses(tokens)[0].cpu()
        spliced = model.token_losses(
            tokens, hook_point, lambda live: torch.where(kept[:, None].to(live.device), x_hat.to(live.device), live)
        )[0].cpu()
    acts = sae.encode(x)
    positions, features = torch.nonzero(acts, as_tuple=True)
    without_features = restored(sae.input_bias.expand_as(x), x, sae.row_norm)
    error = (x - x_hat).double().pow(2).sum(-1) / (x - without_features).double().pow(2).sum(-1).clamp_min(1e-12)
    first = torch.full((1,), torch.nan)
    return Inspection(
        list(ids),
        positions,
        features,
        acts[positions, features],
        error.float(),
        torch.cat([first, loss]),
        torch.cat([first, spliced]),
    )


class Attribution(NamedTuple):
    """What each active feature adds to `logit`: a next token's logit minus the mean over the vocabulary's tokens.

    `by_feature[i]` belongs to the i-th entry of `positions` and `features`. If `exact`, by_feature, `bias` (b_dec),
    `unexplained` (x − x̂) and `rest` (everything else in the residual stream, and biases) sum to `logit`, with the
    things named in `held_fixed` held at their values. Otherwise by_feature is gradient × activation, a first-order
    estimate, and `rest` is the difference to `logit`. With `before_soft_cap` (Gemma 2) it is the logit before the cap.
    """

    positions: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    by_feature: Float[Tensor, " n"]
    bias: float
    unexplained: float
    rest: float
    logit: float
    exact: bool
    held_fixed: tuple[str, ...] = ()
    before_soft_cap: float | None = None


def attribute(
    model: LanguageModel, sae: SAE, ids: Sequence[int], *, position: int, token: int, hook_point: str
) -> Attribution:
    """How much each active feature pushes the logit of `token` as the next token after `position`.

    Exact if `only_final_norm_reads`: `a · (r − mean r) · w_ln / σ · (W_U[:, token] − mean W_U)` with r the feature's
    direction in the residual stream and σ the final norm's scale at `position`; RMSNorm keeps the mean. A norm between
    the hook point and the stream (Gemma 2 and 3, OLMo 2) is held at its scale there, too. Otherwise gradient ×
    activation over all positions. The mean over the vocabulary is subtracted because it cancels in the softmax.
    Raises: ValueError when position or token does not exist, for a transcoder, or if each row is scaled by itself.
    """
    refuse_crosscoder(sae, "attribution")
    refuse_transcoder(sae, "attribution")
    refuse_row_scale(sae, "attribution")
    if not 0 <= position < len(ids):
        raise ValueError(f"attribution: position {position} is outside the prompt's 0 … {len(ids) - 1}.")
    if not 0 <= token < model.d_vocab:
        raise ValueError(f"attribution: token {token} is outside the vocabulary's 0 … {model.d_vocab - 1:,}.")
    tokens = torch.tensor([list(ids)])[:, : position + 1]  # later tokens have no influence

    def objective(logits: Tensor) -> Tensor:
        last = logits[0, -1].double()
        return last[token] - model.of_tokens(last).mean()

    held: tuple[str, ...] = ()
    cap = None
    with model.lock:
        exact, logits = only_final_norm_reads(model, hook_point), model.logits(tokens)
        if exact:
            x, gradient, held = _gradient_at_fixed_norms(model, tokens, token, hook_point)
            cap = model.readout().soft_cap
            logits = model.readout().uncapped(logits.double())
        else:
            x, gradient = model.gradient(tokens, hook_point, objective)
        logit = float(objective(logits))
    with torch.inference_mode():
        x, gradient = x[0].cpu(), gradient[0].cpu().double()
        acts, x_hat = sae.encode(x).double(), sae(x).double()
        positions, features = torch.nonzero(acts, as_tuple=True)
        reached = gradient.abs().sum(-1) > 0
        positions, features = positions[reached[positions]], features[reached[positions]]
        by_feature = acts[positions, features] * (sae.W_dec[features].double() * gradient[positions]).sum(-1)
        bias = float((gradient @ sae.b_dec.double()).sum())
        unexplained = float((gradient * (x.double() - x_hat)).sum())
    rest = logit - float(by_feature.sum()) - bias - unexplained
    return Attribution(positions, features, by_feature.float(), bias, unexplained, rest, logit, exact, held, cap)


@torch.inference_mode()
def _gradient_at_fixed_norms(
    model: LanguageModel, tokens: Int[Tensor, "1 pos"], token: int, hook_point: str
) -> tuple[Float[Tensor, "1 pos d_in"], Float[Tensor, "1 pos d_in"], tuple[str, ...]]:
    """x, the gradient of the last position's logit minus the vocabulary's mean at fixed scales, and what is fixed."""
    path, read = model.direct_path(hook_point), model.readout()
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    resid = model.capture(tokens, last)[0, -1].double()
    W_U = read.W_U.to(resid.device)
    push = W_U[:, token].double() - model.of_tokens(W_U).double().mean(-1)
    push = read.norm.transposed(push * read.factor) / read.norm.scale(resid)
    held: tuple[str, ...] = ("the final norm's scale",)
    if path.norm is not None and path.norm_input is not None:
        push = push / path.norm.scale(model.capture(tokens, path.norm_input)[0, -1].double())
        held += (f"the scale of the norm at {path.norm_input.removesuffix('.hook_in')}",)
    x = model.capture(tokens, hook_point)
    gradient = torch.zeros_like(x, dtype=torch.float64)
    gradient[0, -1] = path.transposed(push)
    return x, gradient, held


@torch.inference_mode()
def predictions(model: LanguageModel, ids: Sequence[int], n: int) -> list[tuple[int, float]]:
    """The `n` likeliest tokens after `ids` with their probabilities, likeliest first."""
    with model.lock:
        logits = model.logits(torch.tensor([list(ids)]))[0, -1]
    probabilities, found = model.top_tokens(logits.double().softmax(-1), n)
    return list(zip(found.tolist(), probabilities.tolist(), strict=True))
