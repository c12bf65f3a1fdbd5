"""Training one dictionary: resumable bit for bit, interruptible at any step.

Imports torch, numpy and safetensors alone, so it runs on a bare GPU box.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import losses, optim
from sae.checkpoint import read_tensors, write_tensors
from sae.config import TrainConfig
from sae.kernels import choose, device_named, matmul, ops
from sae.kernels.acts import FeatureActs, l0
from sae.kernels.support import Above
from sae.model import SAE, fold_scale, save
from sae.progress import Interrupted, interruptible, progress
from sae.recipes import Recipe, recipe_named
from sae.rows import Rows, prefetched
from sae.rundir import claim, cut_log

SCALE_ROWS = 65_536
LOG_STEPS = 25
SPARSE_BELOW_DENSITY = 1 / 20  # about where the four sparse products cost what dense ones do


@dataclass
class TrainState:
    """Everything that changes while training; functions hold no state."""

    sae: SAE  # on scaled inputs
    optimizer: optim.Adam
    scale: float
    tokens_since_fired: Int[Tensor, " d_sae"]
    step: int = 0
    density: float = 1.0  # share of features active at the last step: decides between dense and sparse products
    resampled: list[dict[str, Any]] = field(default_factory=list)
    matmul: str = "highest"  # the dense products, chosen at the start and kept, so that a resumed run does as this one

    @property
    def device(self) -> torch.device:
        return self.tokens_since_fired.device


def train(
    rows: Rows,
    out: str | Path,
    config: TrainConfig,
    *,
    provenance: dict[str, Any] | None = None,
    save_minutes: float = 2.0,
    kernels: str = "auto",
    device: str = "auto",
) -> SAE:
    """Trains a dictionary on `rows` into the directory `out`; repeat the call to go on after an interruption.

    It goes on with the kernels and on the kind of device it began with, so that the result is the same bit for bit
    (with `reference` kernels on a GPU not quite: torch adds there in no fixed order). The result is on the CPU.
    Writes sae.safetensors (scale folded in), config.json, metrics.jsonl; state.safetensors while it runs and after.
    Raises: ValueError when `out` holds a run with other settings or the loss is not finite; Interrupted on Ctrl-C.
    """
    out = Path(out)
    recipe = recipe_named(config.recipe)
    claim(out, "train.json", {"train": config.to_dict(), "rows": provenance or {}})
    state = _restore(out, config, recipe, rows.d_in, device)
    if state is None:
        place = device_named(device)
        state = _start(rows, config, recipe, choose(kernels, place), place)
    saved = time.monotonic()
    with (
        interruptible() as interrupt,
        progress("train", config.tokens, "tok", initial=state.step * config.batch_tokens) as bar,
        (out / "metrics.jsonl").open("a") as log,
    ):
        logged_at, logged_step, stall_s = time.perf_counter(), state.step, 0.0
        for batch, waited_s in prefetched(rows, state.step, config.steps, pinned=state.device.type == "cuda"):
            with matmul.using(state.matmul):
                metrics = train_step(state, batch.x, config)
            stall_s += waited_s
            last = state.step == config.steps
            resampling = recipe.resample and state.step in config.resample_steps
            logging = state.step % LOG_STEPS == 0 or last
            saving = interrupt.requested or last or time.monotonic() - saved > 60 * save_minutes
            if resampling or logging or saving:
                _check_finite(metrics["loss"], state, config)
            if resampling:
                _resample(state, rows, config, recipe)
            bar.update(config.batch_tokens)
            if logging:
                seconds = time.perf_counter() - logged_at
                pace = {
                    "rows_per_s": round(config.batch_tokens * (state.step - logged_step) / seconds),
                    "stall_share": round(stall_s / seconds, 4),
                }
                logged_at, logged_step, stall_s = time.perf_counter(), state.step, 0.0
                entry = _measured(metrics, state, config)
                log.write(json.dumps(entry | pace) + "\n")
                log.flush()
                bar.set_postfix(fvu=f"{entry['fvu']:.4f}", l0=f"{entry['l0']:.1f}", dead=f"{entry['dead_share']:.1%}")
            if saving:
                save_state(out, state)
                saved = time.monotonic()
            if saving and interrupt.requested and not last:
                raise Interrupted(
                    f"stopped at step {state.step:,} of {config.steps:,}, saved in {out}. Repeat the command to go on."
                )
    sae = fold_scale(state.sae, state.scale)
    sae.config = _final_config(state, config, provenance or {})
    save(sae, out, sae.config)
    return sae.eval().requires_grad_(False)


def train_step(state: TrainState, raw: Float[Tensor, "batch d_in"], config: TrainConfig) -> dict[str, Tensor]:
    """One step: forward, losses, backward, projected Adam, renormalised decoder. Returns tensors to log."""
    sae = state.sae
    x = raw.to(state.device, non_blocking=True) * state.scale
    acts = _feature_acts(state, x)
    x_hat = sae.output(acts, x)
    error = losses.squared_error(x, x_hat)
    loss = error
    if config.l1:
        loss = loss + config.l1 * losses.l1_norm(acts)
    if config.aux_coefficient:
        dead = state.tokens_since_fired >= config.dead_after_tokens
        loss = loss + config.aux_coefficient * _aux(state, x, x_hat, dead)
    loss.backward()
    state.optimizer.step(optim.learning_rate(state.step, config))
    active = l0(acts)
    state.density = active.item() / sae.d_sae
    state.tokens_since_fired += len(x)
    state.tokens_since_fired[acts.fired()] = 0
    state.step += 1
    return {"loss": loss.detach(), "error": error.detach(), "l0": active, "x": x.detach()}


def _feature_acts(state: TrainState, x: Tensor) -> FeatureActs:
    """Sparse where that is cheaper, which the last step's density tells: so a resumed run does as the unbroken one."""
    if isinstance(state.sae.rule, Above) and state.density >= SPARSE_BELOW_DENSITY:
        return state.sae.encode_dense(x)
    return state.sae.feature_acts(x, state.optimizer.kernels)


def _aux(state: TrainState, x: Tensor, x_hat: Tensor, dead: Tensor) -> Tensor:
    # Gao et al. weigh AuxK against a squared error normalised by the variance; ours is not: multiply it back.
    variance = (x - x.mean(0)).pow(2).sum(-1).mean()
    return losses.aux_k_loss(state.sae, x, x - x_hat, dead) * variance.detach()


def _check_finite(loss: Tensor, state: TrainState, config: TrainConfig) -> None:
    """Stops a run that has gone wrong before anything of it is saved or resampled from."""
    if not (loss.isfinite() and all(tensor.isfinite().all() for tensor in state.sae.tensors().values())):
        raise ValueError(
            f"training: the loss is {loss.item()} at step {state.step:,}. The last checkpoint is kept; "
            f"likely cause: lr = {config.lr:g} is too high, or rows that are not finite (`sae verify` the store)."
        )


def _measured(metrics: dict[str, Tensor], state: TrainState, config: TrainConfig) -> dict[str, Any]:
    """The logged line; fvu is relative to the batch's own variance (0 where all its rows are equal)."""
    x = metrics["x"]
    variance = (x - x.mean(0)).pow(2).sum(-1).mean()
    return {
        "step": state.step,
        "rows": state.step * config.batch_tokens,
        "loss": metrics["loss"].item(),
        "fvu": (metrics["error"] / variance).item() if variance > 0 else 0.0,
        "l0": metrics["l0"].item(),
        "dead_share": (state.tokens_since_fired >= config.dead_after_tokens).float().mean().item(),
        "lr": optim.learning_rate(state.step - 1, config),
    }


# --- start, resampling -----------------------------------------------------------------------------------------------


def _start(
    rows: Rows, config: TrainConfig, recipe: Recipe, kernels: ops.Kernels, device: str | torch.device = "cpu"
) -> TrainState:
    sample = rows.sample(SCALE_ROWS, config.seed)
    mean_square = sample.double().pow(2).sum(-1).mean().item()
    if not mean_square > 0:
        raise ValueError("training: every sampled activation is zero; is the hook point right?")
    scale = math.sqrt(rows.d_in / mean_square)
    sae = SAE(rows.d_in, config.d_sae, activation=recipe.activation, k=config.k or None)
    optim.initialise_(sae, sample * scale, recipe.encoder_init, config.seed)
    adam = optim.Adam(sae.to(device), kernels, beta1=config.beta1)
    unfired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
    return TrainState(sae, adam, scale, unfired, matmul=matmul.choose(config.matmul, sae.W_enc.device))


@torch.no_grad()
def _resample(state: TrainState, rows: Rows, config: TrainConfig, recipe: Recipe) -> None:
    """The paper's resampling event; what was done is kept per feature for the log."""
    window_tokens = config.resample_window_steps * config.batch_tokens
    dead = (state.tokens_since_fired >= window_tokens).nonzero().squeeze(-1)
    if not len(dead):
        return
    seed = config.seed * 1_000_003 + state.step
    sample = rows.sample(config.resample_rows, seed) * state.scale
    chunks = sample.split(config.batch_tokens)
    errors = torch.cat([_row_losses(state, chunk.to(state.device), config).cpu() for chunk in chunks])
    generator = torch.Generator().manual_seed(seed)
    restart = optim.reseed_ if recipe.resample == "rank" else optim.resample_
    parents = restart(state.sae, state.optimizer, dead, sample, errors, generator)
    dead = dead[: len(parents)]
    ages = state.tokens_since_fired[dead].tolist()
    state.tokens_since_fired[dead] = 0
    state.resampled.append(
        {"step": state.step, "features": dead.tolist(), "sample_rows": parents.tolist(), "silent_tokens": ages}
    )


def _row_losses(state: TrainState, x: Tensor, config: TrainConfig) -> Tensor:
    acts = state.sae.feature_acts(x, state.optimizer.kernels).sparse()
    x_hat = state.sae.output(acts, x)
    penalty = acts.decode(x.new_ones(state.sae.d_sae, 1)).squeeze(-1)  # Σ f, in one order on every device
    return (x - x_hat).pow(2).sum(-1) + config.l1 * penalty


# --- state on disk ---------------------------------------------------------------------------------------------------


def save_state(out: Path, state: TrainState) -> None:
    """Everything needed to go on, in one file, by one atomic rename."""
    tensors = {f"sae.{name}": tensor for name, tensor in state.sae.tensors().items()}
    tensors |= state.optimizer.tensors()
    tensors["tokens_since_fired"] = state.tokens_since_fired
    header = {
        "step": state.step,
        "scale": state.scale,
        "resampled": state.resampled,
        "density": state.density,
        "kernels": state.optimizer.kernels.NAME,
        "matmul": state.matmul,
        "device": state.device.type,
    }
    write_tensors(out / "state.safetensors", tensors, header)


def _restore(out: Path, config: TrainConfig, recipe: Recipe, d_in: int, device: str) -> TrainState | None:
    """The saved state, with metrics.jsonl cut to its step, on the kernels and the kind of device it began with; None
    when there is none. Raises: ValueError for another device."""
    log = out / "metrics.jsonl"
    if not (out / "state.safetensors").exists():
        log.unlink(missing_ok=True)
        return None
    tensors, header = read_tensors(out / "state.safetensors")
    sae = SAE(d_in, config.d_sae, activation=recipe.activation, k=config.k or None)
    sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
    began_on = header.get("device", "cpu")
    if device not in ("auto", began_on):
        raise ValueError(
            f"{out} was begun on {began_on}; on {device} it would not go on bit for bit. Say --device {began_on}, or "
            "choose another --out."
        )
    place = device_named(began_on)
    adam = optim.Adam(sae.to(place), choose(header["kernels"], place), beta1=config.beta1)
    adam.restore(tensors, header["step"])
    cut_log(log, header["step"])
    return TrainState(
        sae, adam, header["scale"], tensors["tokens_since_fired"].to(place), header["step"], header["density"],
        header["resampled"], matmul.resumed(header["matmul"], config.matmul),
    )  # fmt: skip


def _final_config(state: TrainState, config: TrainConfig, provenance: dict[str, Any]) -> dict[str, Any]:
    """config.json: the resolved settings, and λ in every convention in use."""
    d_in = state.sae.d_in
    return {
        "recipe": config.recipe,
        "train": config.to_dict(),
        "input_scale": state.scale,
        "kernels": state.optimizer.kernels.NAME,
        "matmul": state.matmul,
        "device": state.device.type,
        "lambda": {
            "scaled": config.l1,
            "raw": config.l1 / state.scale,
            "raw_mean_squared": config.l1 / state.scale / d_in,
            "meaning": "raw: ‖x−x̂‖² summed over d_in, mean over the batch, + λ Σ f in the model's units; "
            "raw_mean_squared: the same with the squared error averaged over d_in (the paper's convention)",
        },
        "resample_events": [{"step": event["step"], "features": len(event["features"])} for event in state.resampled],
        **provenance,
    }
