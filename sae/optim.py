"""The decoder's constraint, the schedule, and the surgery that gives dead features a new start."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.config import TrainConfig
from sae.kernels.ops import Kernels
from sae.model import SAE

ENCODER_SHARE_OF_ALIVE_NORM = 0.2
MEDIAN_ROWS = 16_384
ROWS_AT_ONCE = 1024
SEED_ROWS = 32_768
THRESHOLD_ROWS = 2048
POOL_PER_DEAD = 4
ROWS_DRAWN_AT_ONCE = 128


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over `warmup_share`, constant, linear to zero over the last `decay_share` of the run.

    With `rewarm_share`, after each resampling also from a tenth back to the whole along a cosine.
    Source: for the latter Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix.
    """
    warmup_steps = config.warmup_share * config.steps
    decay_steps = config.decay_share * config.steps
    rise = (step + 1) / warmup_steps if warmup_steps > step else 1.0
    fall = (config.steps - step) / decay_steps if decay_steps > config.steps - step else 1.0
    return config.lr * min(1.0, rise, fall) * _rewarmed(step, config)


def _rewarmed(step: int, config: TrainConfig) -> float:
    since = [step - event for event in config.resample_steps if step >= event]
    rewarm_steps = config.rewarm_share * config.steps
    if not since or min(since) >= rewarm_steps:
        return 1.0
    return 1.0 - 0.45 * (1 + math.cos(math.pi * min(since) / rewarm_steps))


class Adam:
    """Adam on a dictionary's parameters, in one pass of the kernels per matrix; with `unit_norm` decoder rows keep it.

    It owns the gradients: `.grad` exists from the start and is zero before each step, so that backward adds in place.
    Source: Kingma and Ba 2015; for the decoder Bricken et al. 2023, appendix (gradient parallel to a row removed).
    """

    def __init__(
        self, sae: SAE, kernels: Kernels, *, beta1: float, beta2: float = 0.999, eps: float = 1e-8,
        unit_norm: bool = True, clip: float = 0.0, threshold_lr_ratio: float = 1.0,
    ) -> None:  # fmt: skip
        self.sae, self.kernels, self.beta1, self.beta2, self.eps = sae, kernels, beta1, beta2, eps
        self.unit_norm, self.clip, self.threshold_lr_ratio = unit_norm, clip, threshold_lr_ratio
        self.step_count = 0
        self.moments = {
            name: {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            for name, parameter in sae.named_parameters()
        }
        for parameter in sae.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Moves every parameter by its gradient (of norm `clip` at most), and zeroes the gradients."""
        self.step_count += 1
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.clip)
        for name, parameter in self.sae.named_parameters():
            assert parameter.grad is not None
            rows = [_rows(name, t) for t in (parameter, parameter.grad, *self.moments[name].values())]
            rate = lr * self.threshold_lr_ratio if name == "threshold" else lr
            self.kernels.adam_(
                *rows, step=self.step_count, lr=rate, beta1=self.beta1, beta2=self.beta2, eps=self.eps,
                unit_rows=name == "W_dec" and self.unit_norm,
            )  # fmt: skip
            parameter.grad.zero_()
            if name == "threshold":
                parameter.clamp_(min=0.0)

    def forget(self, features: Int[Tensor, " n"]) -> None:
        """Zeroes the moments of some features: their encoder columns, decoder rows, biases, gates and thresholds."""
        for name, moments in self.moments.items():
            for moment in moments.values():
                if name == "W_enc":
                    moment[:, features] = 0.0
                elif name not in ("b_dec", "W_skip"):
                    moment[features] = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors: `adam.<parameter>.<moment>`."""
        return {f"adam.{name}.{m}": t for name, moments in self.moments.items() for m, t in moments.items()}

    def restore(self, tensors: dict[str, Tensor], step_count: int) -> None:
        """Puts back what `tensors` gave."""
        self.step_count = step_count
        for name, moment in self.tensors().items():
            moment.copy_(tensors[name])


def _rows(name: str, tensor: Tensor) -> Tensor:
    """A parameter as the matrix it is in memory: the encoder feature by feature, a vector as one row."""
    return tensor.t() if name == "W_enc" else tensor if tensor.dim() == 2 else tensor[None]


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


def spread_rows(directions: Float[Tensor, "n d_in"], count: int, generator: torch.Generator) -> Int[Tensor, " chosen"]:
    """Up to `count` unit rows far from each other: each is drawn with P ∝ its cosine distance to the nearest so far.

    Fewer than `count` when the rows run out. Many are drawn at once from the last distances, and one is taken with the
    chance that its distance has not shrunk by those taken since, which is the same law.
    Source: k-means++ (Arthur and Vassilvitskii 2007).
    """
    distance = directions.norm(dim=-1).double()  # a zero row is no direction and is never drawn
    chosen: list[int] = []
    while len(chosen) < count and distance.sum() > 0:
        drawn = torch.multinomial(distance, ROWS_DRAWN_AT_ONCE, replacement=True, generator=generator)
        between = (1 - directions[drawn] @ directions[drawn].T).clamp_min(0).double()
        between[drawn[:, None] == drawn] = 0.0
        bars = torch.rand(len(drawn), generator=generator, dtype=torch.float64) * distance[drawn]
        taken: list[int] = []
        for i in range(len(drawn)):
            if len(chosen) + len(taken) < count and (not taken or between[i, taken].min() > bars[i]):
                taken.append(i)
        rows = drawn[taken]
        chosen += rows.tolist()
        nearest = (1 - directions @ directions[rows].T).amin(1).clamp_min(0).double()
        distance = torch.minimum(distance, nearest)
        distance[rows] = 0
    return torch.tensor(chosen, dtype=torch.long)


@torch.no_grad()
def resample_(
    sae: SAE,
    optimizer: Adam,
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
    directions = torch.nn.functional.normalize(rows[chosen].to(sae.W_enc.device), dim=-1)
    alive = torch.ones(sae.d_sae, dtype=torch.bool, device=sae.W_enc.device)
    alive[dead] = False
    encoder_norms = sae.W_enc.norm(dim=0)
    alive_norm = encoder_norms[alive].mean() if alive.any() else encoder_norms.mean()
    _restart(sae, optimizer, dead, directions * (ENCODER_SHARE_OF_ALIVE_NORM * alive_norm), directions)
    return chosen


@torch.no_grad()
def reseed_(
    sae: SAE,
    optimizer: Adam,
    dead: Int[Tensor, " n_dead"],
    rows: Float[Tensor, "n d_in"],
    losses: Float[Tensor, " n"],
    generator: torch.Generator,
) -> Int[Tensor, " n_placed"]:
    """Gives dead TopK features a place among the k of a badly reconstructed input; returns the rows chosen.

    P(row) ∝ loss, thinned to rows far from each other. The encoder column is the centred input x − b_dec, scaled so
    that on it the feature ranks in the middle of the k active ones; the decoder row is what is missing there, x − x̂, at
    unit norm; the encoder bias is 0. A weaker start never wins a place and stays dead, a stronger one drives out what
    works. Fewer rows than dead features: the rest waits for the next time.
    """
    assert sae.k is not None
    pool = min(POOL_PER_DEAD * len(dead), int((losses > 0).sum()))
    candidates = torch.multinomial(losses.double(), pool, replacement=False, generator=generator)
    centred = rows[candidates] - sae.b_dec.to(rows.device)
    chosen = candidates[spread_rows(torch.nn.functional.normalize(centred, dim=-1), len(dead), generator)]
    dead, x = dead[: len(chosen)], rows[chosen].to(sae.W_enc.device)
    feature_acts = sae.encode(x)
    rank = (sae.k + 1) // 2
    middle = feature_acts.topk(rank, dim=-1).values[:, -1:]
    centred = x - sae.b_dec
    encoder = centred * (middle / centred.pow(2).sum(-1, keepdim=True).clamp_min(1e-12))
    _restart(sae, optimizer, dead, encoder, torch.nn.functional.normalize(x - sae.decode(feature_acts), dim=-1))
    return chosen


def _restart(sae: SAE, optimizer: Adam, features: Tensor, encoder: Tensor, decoder: Tensor) -> None:
    sae.W_enc[:, features] = encoder.T
    sae.W_dec[features] = decoder
    sae.b_enc[features] = 0.0
    if sae.activation == "gated":  # the magnitude is the gate's value again, as at the start
        sae.r_mag[features] = 0.0
        sae.b_mag[features] = 0.0
    optimizer.forget(features)
