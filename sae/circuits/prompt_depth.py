"""What the logit lens and the tuned lens read in one prompt, at each depth, beside the streams of other positions.

The lenses themselves, their sources and their measures over a text are in `sae.circuits.depth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.circuits.depth import Translator, depths_of
from sae.circuits.unembedding import unembedding_of
from sae.lm import LanguageModel


class PromptReading(NamedTuple):
    """What one lens reads. `kl` is KL(p_final ‖ p_lens) in nats; `rank` counts the tokens that the lens finds likelier
    than the true next token (nan at the last position, where it is unknown).

    `kl_elsewhere` and `rank_elsewhere` are the control: what is asked of a position is read from the stream of another
    one, mean over all others (nan where there is none).
    """

    depths: list[str]
    token: Int[Tensor, "depth pos"]  # the likeliest
    p: Float[Tensor, "depth pos"]  # its probability
    p_next: Float[Tensor, "depth pos"]  # that of the true next token
    kl: Float[Tensor, "depth pos"]
    rank: Float[Tensor, "depth pos"]
    kl_elsewhere: Float[Tensor, "depth pos"]
    rank_elsewhere: Float[Tensor, "depth pos"]


@torch.inference_mode()
def read_prompt(model: LanguageModel, ids: Sequence[int], maps: Sequence[Translator] | None = None) -> PromptReading:
    """The logit lens on a prompt or, with the affine maps of the depths, the tuned lens.

    Raises: NoLinearPath, ModelError for a model whose logits do not follow from the stream by a norm and W_U;
    ValueError for maps of another model.
    """
    tokens, hooks = torch.tensor([list(ids)]), depths_of(model)
    if maps is not None and len(maps) != len(hooks):
        raise ValueError(f"depth: maps of {len(maps)} depths; {model.id} has {len(hooks)}.")
    unembedding = unembedding_of(model, tokens)
    streams = model.capture_all(tokens, hooks)
    final = unembedding.log_p(streams[hooks[-1]][0])
    following = tokens[0, 1:].to(final.device)
    columns = []
    for number, hook in enumerate(hooks):
        stream = streams[hook][0]
        log_p = unembedding.log_p(stream if maps is None else maps[number](stream))
        columns.append(_column(model, final, log_p, following))
    return PromptReading(hooks, *(torch.stack(part).cpu() for part in zip(*columns, strict=True)))


def _column(
    model: LanguageModel,
    final: Float[Tensor, "pos d_vocab"],
    log_p: Float[Tensor, "pos d_vocab"],
    following: Int[Tensor, " next"],
) -> tuple[Tensor, ...]:
    """The fields of `PromptReading` at one depth."""
    n, n_next = len(log_p), len(following)
    best, token = model.top_tokens(log_p, 1)
    p = final.exp()
    kl = (p * final).sum(-1, keepdim=True) - p @ log_p.T  # [asked at, read from]
    seen = log_p[:, following]  # [read from, asked at]
    ordered = log_p.sort(-1).values
    rank = (log_p.shape[1] - torch.searchsorted(ordered, seen.contiguous(), right=True)).T.float()
    unknown = torch.full((n - n_next,), torch.nan, device=log_p.device)
    return (
        token[:, 0],
        best[:, 0].exp(),
        torch.cat([seen.diagonal().exp(), unknown]),
        kl.diagonal().clamp_min(0),
        torch.cat([rank.diagonal(), unknown]),
        _of_others(kl),
        torch.cat([_of_others(rank), unknown]),
    )


def _of_others(values: Float[Tensor, "asked read"]) -> Float[Tensor, " asked"]:
    """Mean over the positions read from, without the one asked at; nan if there is no other."""
    n = values.shape[1]
    found: Tensor = (
        (values.sum(1) - values.diagonal()) / (n - 1) if n > 1 else values.new_full((len(values),), torch.nan)
    )
    return found
