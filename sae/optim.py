"""The decoder's constraint, the schedule, and the surgery that gives dead features a new start."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.config import TrainConfig
from sae.model import SAE

ENCODER_SHARE_OF_ALIVE_NORM = 0.2


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over `warmup_share`, constant, linear to zero over the last `decay_share` of the run."""
    warmup_steps = config.warmup_share * config.steps
    decay_steps = config.decay_share * config.steps
    rise = (step + 1) / warmup_steps if warmup_steps > step else 1.0
    fall = (config.steps - step) / decay_steps if decay_steps > config.steps - step else 1.0
    return config.lr * min(1.0, rise, fall)


@torch.no_grad()
def project_decoder_gradient_(sae: SAE) -> None:
    """Removes from each decoder row's gradient its part along the row: it would only change the norm.

    Source: Bricken et al. 2023, appendix ("small but real" gain over renormalising alone).
    """
    grad = sae.W_dec.grad
    assert grad is not None
    grad -= (grad * sae.W_dec).sum(-1, keepdim=True) * sae.W_dec


@torch.no_grad()
def normalise_decoder_(sae: SAE) -> None:
    """Sets every decoder row to unit L2 norm; call it after the optimiser's step."""
    sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))


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
def initialise_(sae: SAE, median: Float[Tensor, " d_in"], encoder_init: str, seed: int) -> None:
    """PyTorch's Kaiming-uniform weights with unit decoder rows, b_dec at the geometric median, b_enc at zero."""
    generator = torch.Generator().manual_seed(seed)
    sae.b_dec.copy_(median)
    sae.b_enc.zero_()
    sae.W_dec.uniform_(-1.0, 1.0, generator=generator)
    normalise_decoder_(sae)
    if encoder_init == "transpose":
        sae.W_enc.copy_(sae.W_dec.T)
        return
    bound = sae.d_in**-0.5
    sae.W_enc.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def resample_(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    dead: Int[Tensor, " n_dead"],
    rows: Float[Tensor, "n d_in"],
    losses: Float[Tensor, " n"],
    generator: torch.Generator,
) -> Int[Tensor, " n_dead"]:
    """Points dead features at badly reconstructed inputs and forgets their Adam moments; returns the rows chosen.

    P(row) ∝ loss². The decoder row is the input at unit norm, the encoder column the same at 0.2 × the mean encoder
    norm of the living, the encoder bias 0.
    Source: Bricken et al. 2023, "Neuron resampling".
    """
    chosen = torch.multinomial(losses.double().pow(2), len(dead), replacement=True, generator=generator)
    directions = torch.nn.functional.normalize(rows[chosen], dim=-1)
    alive = torch.ones(sae.d_sae, dtype=torch.bool, device=sae.W_enc.device)
    alive[dead] = False
    encoder_norms = sae.W_enc.norm(dim=0)
    alive_norm = encoder_norms[alive].mean() if alive.any() else encoder_norms.mean()
    sae.W_dec[dead] = directions
    sae.W_enc[:, dead] = (directions * (ENCODER_SHARE_OF_ALIVE_NORM * alive_norm)).T
    sae.b_enc[dead] = 0.0
    for parameter, index in ((sae.W_dec, (dead,)), (sae.W_enc, (slice(None), dead)), (sae.b_enc, (dead,))):
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state.get(parameter, {}):
                optimizer.state[parameter][moment][index] = 0.0
    return chosen
