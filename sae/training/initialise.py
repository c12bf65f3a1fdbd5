"""How a dictionary's tensors start."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import spread_rows
from sae.training.adam import normalise_decoder_

MEDIAN_ROWS = 16_384
ROWS_AT_ONCE = 1024
SEED_ROWS = 32_768
THRESHOLD_ROWS = 2048


@torch.no_grad()
def geometric_median(
    rows: Float[Tensor, "n d_in"], *, iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d_in"]:
    """`argmin_m Σ ‖x − m‖` by Weiszfeld's iteration, in float64 sums."""
    median = rows.mean(0, dtype=torch.float64)
    wide = rows.double()
    for _ in range(iterations):
        weights = 1.0 / (wide - median).norm(dim=-1).clamp_min(1e-12)
        moved = (weights @ wide) / weights.sum()
        shift = (moved - median).norm()
        median = moved
        if shift <= tolerance * median.norm().clamp_min(1e-12):
            break
    return median.to(rows.dtype)


@torch.no_grad()
def initialise_(
    sae: SAE,
    sample: Float[Tensor, "n d_in"],
    encoder_init: str,
    seed: int,
    *,
    target: Float[Tensor, "n d_out"] | None = None,
    decoder_norm: float = 1.0,
    threshold: float = 0.0,
    l0: float = 0.0,
) -> None:
    """b_dec at the geometric median of the targets (x itself by default), b_enc at zero, and one of three weights.

    `kaiming`: PyTorch's uniform weights, encoder and decoder independent (Bricken et al. 2023).
    `data`: decoder rows spread over the data's directions, encoder = α · decoderᵀ, with the α that reconstructs best.
    Every feature then has inputs of its own from the first step; under TopK, random rows lose to the first that learn.
    `tied`: random decoder rows of norm `decoder_norm` (else 1), encoder = decoderᵀ, b_dec = 0 (Anthropic, April 2024).
    A JumpReLU's thresholds start at `threshold`, or all where the sample has `l0` features active on average.
    """
    generator = torch.Generator().manual_seed(seed)
    sae.b_dec.copy_(geometric_median((sample if target is None else target)[:MEDIAN_ROWS]))
    sae.b_enc.zero_()
    sae.W_dec.uniform_(-1.0, 1.0, generator=generator)
    normalise_decoder_(sae)
    if encoder_init == "tied":
        sae.b_dec.zero_()
        sae.W_dec.mul_(decoder_norm)
        sae.W_enc.copy_(sae.W_dec.T)
        return
    if encoder_init == "data":
        directions = torch.nn.functional.normalize(sample[:SEED_ROWS] - sae.b_dec, dim=-1)
        chosen = spread_rows(directions, sae.d_sae, generator)
        sae.W_dec[: len(chosen)] = directions[chosen]
        sae.W_enc.copy_(sae.W_dec.T)
        if sae.activation == "jumprelu":
            pre = (sample[:THRESHOLD_ROWS] - sae.b_dec) @ sae.W_enc
            sae.threshold.fill_(_least_of_largest(pre, l0) if l0 else threshold)
        if not sae.pre_bias:  # as with one, to start
            sae.b_enc.copy_(-sae.b_dec @ sae.W_enc)
        along, length = sample.new_zeros(()), sample.new_zeros(())
        for part in sample[:MEDIAN_ROWS].split(ROWS_AT_ONCE):  # dense activations of all would outweigh all of training
            x_hat = sae.reconstruct(part) - sae.b_dec
            along += ((part - sae.b_dec) * x_hat).sum()
            length += x_hat.pow(2).sum()
        best = along / length.clamp_min(1e-12)
        sae.W_enc.mul_(best)
        if sae.activation == "jumprelu":
            sae.threshold.mul_(best)
            sae.b_enc.mul_(best)
        return
    bound = sae.d_in**-0.5
    sae.W_enc.uniform_(-bound, bound, generator=generator)


def _least_of_largest(pre: Float[Tensor, "n d_sae"], per_row: float) -> float:
    """The least of the `per_row` · n largest values, at least 0."""
    return max(0.0, pre.flatten().topk(min(pre.numel(), max(1, round(per_row * len(pre))))).values[-1].item())
