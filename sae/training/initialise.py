"""The three ways to initialise a dictionary's weights: at random, tied, or from the data.

It happens on the device of the dictionary and the sample. Random numbers are drawn on the host, so that a seed gives
the same ones everywhere; what is computed from the sample may differ between devices by rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import spread_rows
from sae.training.adam import normalise_decoder_
from sae.training.config import TrainConfig

MEDIAN_ROWS = 16_384
ROWS_AT_ONCE = 1024
SEED_ROWS = 32_768
THRESHOLD_ROWS = 2048
TIED_NORM = 0.1  # of decoder rows that are free to change their norm


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


Initialise = Callable[[SAE, Tensor, Tensor, TrainConfig], None]  # (sae, x, target, config): scaled rows of a sample


@torch.no_grad()
def kaiming_(sae: SAE, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], config: TrainConfig) -> None:
    """PyTorch's uniform weights, encoder and decoder independent; b_dec the geometric median of the targets.

    Source: Bricken et al. 2023, appendix.
    """
    generator = _random_decoder_(sae, config.seed)
    sae.b_dec.copy_(geometric_median(target[:MEDIAN_ROWS]))
    bound = sae.d_in**-0.5
    draw_uniform_(sae.W_enc, bound, generator)


@torch.no_grad()
def tied_(sae: SAE, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], config: TrainConfig) -> None:
    """Random decoder rows of norm `TIED_NORM`, encoder = decoderᵀ, b_dec = 0. Source: Anthropic, April 2024 update."""
    _random_decoder_(sae, config.seed)
    sae.b_dec.zero_()
    sae.W_dec.mul_(TIED_NORM)
    sae.W_enc.copy_(sae.W_dec.T)


@torch.no_grad()
def from_data_(sae: SAE, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"], config: TrainConfig) -> None:
    """Decoder rows spread over the data's directions, encoder = α · decoderᵀ, with the α that reconstructs best.

    So every feature has inputs from the first step; with random rows, TopK would select only the first to learn.
    b_dec is the geometric median of the targets. A JumpReLU's thresholds start at `threshold_init`, or, with
    `target_l0`, at the one value for which the sample has this L0.
    """
    generator = _random_decoder_(sae, config.seed)
    sae.b_dec.copy_(geometric_median(target[:MEDIAN_ROWS]))
    directions = torch.nn.functional.normalize(x[:SEED_ROWS] - sae.b_dec, dim=-1)
    chosen = spread_rows(directions, sae.d_sae, generator)
    sae.W_dec[: len(chosen)] = directions[chosen]
    sae.W_enc.copy_(sae.W_dec.T)
    if sae.activation == "jumprelu":
        sae.threshold.fill_(_threshold_of(sae, x, config.target_l0) if config.target_l0 else config.threshold_init)
    if not sae.pre_bias:  # start as a dictionary with a pre-bias does
        sae.b_enc.copy_(-sae.b_dec @ sae.W_enc)
    _scale_encoder_(sae, x)


def _random_decoder_(sae: SAE, seed: int) -> torch.Generator:
    """Random unit decoder rows and b_enc = 0; returns the generator for what follows."""
    generator = torch.Generator().manual_seed(seed)
    sae.b_enc.zero_()
    draw_uniform_(sae.W_dec, 1.0, generator)
    normalise_decoder_(sae)
    return generator


def draw_uniform_(weights: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fills weights on any device with uniform numbers between −bound and bound from a generator of the host."""
    drawn = weights if weights.device == generator.device else torch.empty_like(weights, device=generator.device)
    drawn.uniform_(-bound, bound, generator=generator)
    if drawn is not weights:
        weights.copy_(drawn)


def _scale_encoder_(sae: SAE, x: Float[Tensor, "n d_in"]) -> None:
    """Multiplies activations by the one number that minimises the squared error on x."""
    along, length = x.new_zeros(()), x.new_zeros(())
    # In parts: dense activations of all rows would need more memory than training does.
    for part in torch.split(x[:MEDIAN_ROWS], ROWS_AT_ONCE):
        x_hat = sae.reconstruct(part) - sae.b_dec
        along += ((part - sae.b_dec) * x_hat).sum()
        length += x_hat.pow(2).sum()
    best = along / length.clamp_min(1e-12)
    sae.W_enc.mul_(best)
    if sae.activation == "jumprelu":
        sae.threshold.mul_(best)
        sae.b_enc.mul_(best)


def _threshold_of(sae: SAE, x: Float[Tensor, "n d_in"], l0: float) -> float:
    """The threshold, at least 0, above which the sample has `l0` pre-activations per row."""
    pre = (x[:THRESHOLD_ROWS] - sae.b_dec) @ sae.W_enc
    count = min(pre.numel(), max(1, round(l0 * len(pre))))
    return max(0.0, pre.flatten().topk(count).values[-1].item())
