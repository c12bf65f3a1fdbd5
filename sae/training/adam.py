"""Adam on a dictionary's parameters, its learning rate schedule, and the unit norm of decoder rows."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE, WHOLE
from sae.kernels.autograd import Kernels
from sae.parallel.mesh import ONE, Mesh
from sae.training.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over `warmup_share`, constant, linear to zero over the last `decay_share` of the run.

    With `rewarm_share`, the rate also drops to a tenth at each resampling and returns along a cosine.
    Source of the re-warming: Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix.
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
    """Adam in one kernel pass per matrix; with `unit_norm` decoder rows stay at unit norm.

    It owns the gradients: `.grad` exists from the start and is zero before each step, so that backward adds in place.
    Source: Kingma and Ba 2015; for the decoder Bricken et al. 2023, appendix (the gradient's part along a row is
    removed).
    """

    def __init__(
        self,
        sae: SAE,
        kernels: Kernels,
        *,
        beta1: float,
        beta2: float = 0.999,
        eps: float = 1e-8,
        unit_norm: bool = True,
        clip: float = 0.0,
        threshold_lr_ratio: float = 1.0,
        mesh: Mesh = ONE,
    ) -> None:
        self.sae, self.kernels, self.beta1, self.beta2, self.eps = sae, kernels, beta1, beta2, eps
        self.unit_norm, self.clip, self.threshold_lr_ratio, self.mesh = unit_norm, clip, threshold_lr_ratio, mesh
        self.step_count = 0
        self.moments = {
            name: {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            for name, parameter in sae.named_parameters()
        }
        for parameter in sae.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Updates every parameter from its gradient (clipped to norm `clip`), and zeroes the gradients."""
        self.step_count += 1
        self._share_gradients()
        if self.clip:
            self.clip_gradients()
        for name, parameter in self.sae.named_parameters():
            assert parameter.grad is not None
            rows = self.in_memory(name)
            rate = lr * self.threshold_lr_ratio if name == "threshold" else lr
            self.kernels.adam_(
                *rows,
                step=self.step_count,
                lr=rate,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                unit_rows=name == "W_dec" and self.unit_norm,
            )
            parameter.grad.zero_()
            if name == "threshold":
                parameter.clamp_(min=0.0)

    def in_memory(self, name: str) -> list[Tensor]:
        """A parameter, its gradient and its moments as contiguous matrices, in their order in memory."""
        parameter = self.sae.get_parameter(name)
        assert parameter.grad is not None
        return [_rows(name, tensor) for tensor in (parameter.detach(), parameter.grad, *self.moments[name].values())]

    def _share_gradients(self) -> None:
        """Replaces each gradient of this rank's loss by that of the loss of the step, the mean over ranks."""
        if self.mesh.world == 1:
            return
        for name, parameter in self.sae.named_parameters():
            assert parameter.grad is not None
            gradient = _rows(name, parameter.grad).div_(self.mesh.world)
            self.mesh.reduce_(gradient, "sum", "world" if name in WHOLE else "rows")

    def clip_gradients(self) -> None:
        """Scales the gradients to a joint norm of at most `clip`."""
        if self.mesh.shards == 1:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.clip)
            return
        squares = {name: p.grad.pow(2).sum() for name, p in self.sae.named_parameters() if p.grad is not None}
        own = torch.stack([square for name, square in squares.items() if name not in WHOLE]).sum()
        total = self.mesh.reduce(own, "sum", "features") + sum(squares[name] for name in WHOLE if name in squares)
        factor = (self.clip / (total.sqrt() + 1e-6)).clamp_max(1.0)
        for parameter in self.sae.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(factor)

    def reset_rows(self, features: Int[Tensor, " n"]) -> None:
        """Zeroes the moments of some features: encoder columns, decoder rows, biases, gates and thresholds."""
        for name, moments in self.moments.items():
            for moment in moments.values():
                if name == "W_enc":
                    moment[:, features] = 0.0
                elif name not in WHOLE:
                    moment[features] = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors: `adam.<parameter>.<moment>`."""
        return {f"adam.{name}.{m}": t for name, moments in self.moments.items() for m, t in moments.items()}

    def restore(self, tensors: dict[str, Tensor], step_count: int) -> None:
        """Restores the state that `tensors` returned."""
        self.step_count = step_count
        for name, moment in self.tensors().items():
            moment.copy_(tensors[name])


def _rows(name: str, tensor: Tensor) -> Tensor:
    """A parameter in its order in memory: a matrix with one row per feature for the encoder, one row for a vector."""
    return tensor.t() if name == "W_enc" else tensor if tensor.dim() == 2 else tensor[None]


@torch.no_grad()
def normalise_decoder_(sae: SAE) -> None:
    """Scales every decoder row to unit L2 norm."""
    sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))
