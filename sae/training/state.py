"""What changes while a dictionary trains: made from a sample, saved in one file, put back bit for bit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.jobs.checkpoint import read_header, read_tensors, write_tensors
from sae.kernels import choose, device_named, matmul
from sae.kernels.autograd import Kernels
from sae.training import adam, initialise
from sae.training.config import TrainConfig
from sae.training.recipes import Recipe
from sae.training.rows import Rows
from sae.training.sparsity_penalty import Penalty, at_start

STATE = "state.safetensors"
SCALE_ROWS, SCALE_ROWS_AT_ONCE = 65_536, 4096
TIED_FREE_NORM = 0.1  # of decoder rows that are free, at the start; unit rows start at 1


@dataclass
class TrainState:
    """Everything that changes while training; functions hold no state."""

    sae: SAE  # on scaled inputs
    optimizer: adam.Adam
    scale: float
    tokens_since_fired: Int[Tensor, " d_sae"]
    step: int = 0
    density: float = 1.0  # share of features active at the last step: decides between dense and sparse products
    # {"step", "features": how many} of each event; which ones is in resampled.jsonl, which may be long
    resampled: list[dict[str, int]] = field(default_factory=list)
    penalty: Penalty = field(default_factory=lambda: Penalty(0.0))
    target_scale: float = 0.0  # of y, where it is not x
    downstream: Callable[[Tensor, Tensor], Tensor] | None = None  # not saved: the rows bring it
    matmul: str = "highest"  # the dense products, chosen at the start and kept, so that a resumed run does as this one

    @property
    def device(self) -> torch.device:
        return self.tokens_since_fired.device


def start(
    rows: Rows, config: TrainConfig, recipe: Recipe, kernels: Kernels, device: str | torch.device = "cpu"
) -> TrainState:
    """A new run. Raises: ValueError when the rows are all zero or lack what the recipe needs."""
    _refuse_unfit_rows(rows, recipe)
    sample = rows.sample(SCALE_ROWS, config.seed)
    scale = _scale(sample, rows.d_in)
    target, target_scale = None, scale
    if recipe.needs == "y":
        target = rows.sample_targets(SCALE_ROWS, config.seed)  # type: ignore[attr-defined]
        target_scale = _scale(target, target.shape[1])
        target = target * target_scale
    sae = _dictionary(rows, config, recipe)
    norm = 1.0 if recipe.unit_norm else TIED_FREE_NORM
    initialise.initialise_(
        sae,
        sample * scale,
        recipe.encoder_init,
        config.seed,
        target=target,
        decoder_norm=norm,
        threshold=config.threshold_init,
        l0=config.target_l0,
    )
    return TrainState(
        sae,
        _adam(sae.to(device), kernels, config, recipe),
        scale,
        torch.zeros(config.d_sae, dtype=torch.int64, device=device),
        penalty=at_start(getattr(config, recipe.coefficient) if recipe.coefficient else 0.0, config),
        target_scale=target_scale,
        downstream=getattr(rows, "downstream", None),
        matmul=matmul.choose(config.matmul, sae.W_enc.device),
    )


def save_state(out: Path, state: TrainState, *, keep: int = 1) -> None:
    """Everything needed to go on, in one file, by one atomic rename; `keep` − 1 earlier states stay beside it."""
    if keep > 1:
        _put_aside(out, keep - 1)
    tensors = {f"sae.{name}": tensor for name, tensor in state.sae.tensors().items()}
    tensors |= state.optimizer.tensors()
    tensors["tokens_since_fired"] = state.tokens_since_fired
    header = {
        "step": state.step,
        "scale": state.scale,
        "target_scale": state.target_scale,
        "resampled": state.resampled,
        "density": state.density,
        "penalty": asdict(state.penalty),
        "kernels": state.optimizer.kernels.NAME,
        "matmul": state.matmul,
        "device": state.device.type,
    }
    write_tensors(out / STATE, tensors, header)


def _put_aside(out: Path, keep: int) -> None:
    """Gives the present state a name of its own, state-<step>.safetensors, and drops the oldest of those."""
    if (out / STATE).exists():
        aside = out / f"state-{read_header(out / STATE)['step']:09d}.safetensors"
        if not aside.exists():
            os.link(out / STATE, aside)
    for old in sorted(out.glob("state-*.safetensors"))[:-keep]:
        old.unlink()


def restore(out: Path, rows: Rows, config: TrainConfig, recipe: Recipe, device: str = "auto") -> TrainState | None:
    """The saved state, on the kernels and the kind of device it began with; None when there is none.

    Raises: ValueError for another device.
    """
    if not (out / STATE).exists():
        return None
    tensors, header = read_tensors(out / STATE)
    sae = _dictionary(rows, config, recipe)
    sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
    began_on = header.get("device", "cpu")
    if device not in ("auto", began_on):
        raise ValueError(
            f"{out} was begun on {began_on}; on {device} it would not go on bit for bit. Say --device {began_on}, or "
            "choose another --out."
        )
    place = device_named(began_on)
    adam = _adam(sae.to(place), choose(header["kernels"], place), config, recipe)
    adam.restore(tensors, header["step"])
    return TrainState(
        sae,
        adam,
        header["scale"],
        tensors["tokens_since_fired"].to(place),
        header["step"],
        header["density"],
        header["resampled"],
        Penalty(**header["penalty"]),
        header["target_scale"],
        getattr(rows, "downstream", None),
        matmul.resumed(header["matmul"], config.matmul),
    )


def _dictionary(rows: Rows, config: TrainConfig, recipe: Recipe) -> SAE:
    return SAE(
        rows.d_in,
        config.d_sae,
        activation=recipe.activation,
        k=config.k or None,
        d_out=getattr(rows, "d_out", None) if recipe.needs == "y" else None,
        pre_bias=recipe.pre_bias,
        skip=config.skip,
    )


def _adam(sae: SAE, kernels: Kernels, config: TrainConfig, recipe: Recipe) -> adam.Adam:
    return adam.Adam(
        sae,
        kernels,
        beta1=config.beta1,
        unit_norm=recipe.unit_norm,
        clip=config.clip,
        threshold_lr_ratio=config.threshold_lr_ratio,
    )


def _scale(sample: Tensor, width: int) -> float:
    # By parts: in float64 the whole sample and its squares would be the most memory that a run ever takes.
    mean_square = sum(part.double().pow(2).sum().item() for part in sample.split(SCALE_ROWS_AT_ONCE)) / len(sample)
    if not mean_square > 0:
        raise ValueError("training: every sampled activation is zero; is the hook point right?")
    return math.sqrt(width / mean_square)


def _refuse_unfit_rows(rows: Rows, recipe: Recipe) -> None:
    if recipe.needs == "y" and not hasattr(rows, "sample_targets"):
        raise ValueError(f"recipe {recipe.name} learns y from x; these rows have no y. Name a target hook point.")
    if recipe.needs == "resid" and getattr(rows, "downstream", None) is None:
        raise ValueError(f"recipe {recipe.name} runs the model on from x̂; these rows bring no model to run.")
