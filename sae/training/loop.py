"""Training dictionaries: resumable bit for bit, interruptible at any step, several on one pass over the rows.

Imports torch, numpy and safetensors alone, so it runs on a bare GPU box.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from sae.dictionary.autoencoder import SAE, fold_decoder_norms, fold_scale
from sae.dictionary.files import save
from sae.jobs.directory import claim, cut_log
from sae.jobs.progress import Interrupted, interruptible, progress
from sae.jobs.trackers import Tracker
from sae.kernels import choose, device_named, matmul
from sae.training import lambda_conventions, sparsity_penalty
from sae.training.config import TrainConfig
from sae.training.recipes import Recipe, recipe_named
from sae.training.rows import Batch, Rows, prefetched
from sae.training.state import STATE, TrainState, restore, save_state, start
from sae.training.step import Diverged, _check_weights, _measured, _resample, train_step

CLAIM = "train.json"  # the settings of the run that a directory holds
LOG_STEPS = 25


def train(
    rows: Rows,
    out: str | Path,
    config: TrainConfig,
    *,
    provenance: dict[str, Any] | None = None,
    save_minutes: float = 2.0,
    keep: int = 1,
    kernels: str = "auto",
    device: str = "auto",
    trackers: Sequence[Tracker] = (),
) -> SAE:
    """Trains a dictionary on `rows` into the directory `out`; repeat the call to go on after an interruption.

    It goes on with the kernels and on the kind of device it began with, so that the result is the same bit for bit
    (with `reference` kernels on a GPU not quite: torch adds there in no fixed order). The result is on the CPU.
    Writes sae.safetensors (scale folded in), config.json, metrics.jsonl, resampled.jsonl; state.safetensors while it
    runs and after, and with `keep` > 1 the states before it as state-<step>.safetensors. `trackers` are told what
    metrics.jsonl is told (`sae.jobs.trackers`).
    Raises: ValueError when `out` holds a run with other settings or the loss is not finite; Interrupted on Ctrl-C.
    """
    plan = Plan(Path(out), config, provenance or {}, trackers)
    (found,) = train_together(rows, [plan], save_minutes=save_minutes, keep=keep, kernels=kernels, device=device)
    if isinstance(found, Diverged):
        raise found
    return found


@dataclass(frozen=True)
class Plan:
    """One dictionary to train: where, how, and what is to be known of where its rows come from."""

    out: Path
    config: TrainConfig
    provenance: dict[str, Any]
    trackers: Sequence[Tracker] = ()


def train_together(
    rows: Rows,
    plans: Sequence[Plan],
    *,
    save_minutes: float = 2.0,
    keep: int = 1,
    kernels: str = "auto",
    device: str = "auto",
) -> list[SAE | Diverged]:
    """Trains several dictionaries on one pass over the rows, each bit for bit as `train` would alone.

    Their seeds and batches must be those the rows were made for. One that diverges is given back as its error, and the
    others go on. Raises: as `train`, for rows that are not finite too.
    """
    for plan in plans:
        if (plan.out / STATE).exists() and not (plan.out / CLAIM).exists():
            raise ValueError(
                f"{plan.out} holds the state of a run but not its settings ({CLAIM}): they were deleted, perhaps while "
                "it ran. Delete the directory, or choose another --out."
            )
        claim_run(plan.out, plan.config, plan.provenance)
    with ExitStack() as open_files, interruptible() as interrupt:
        runs = [Run(rows, plan, kernels, device, open_files) for plan in plans]
        first, last = min(run.state.step for run in runs), max(run.config.steps for run in runs)
        behind = sum((run.state.step - first) * run.config.batch_tokens for run in runs)
        total = sum((last - first) * run.config.batch_tokens for run in runs)
        saved, pinned = time.monotonic(), any(run.state.device.type == "cuda" for run in runs)
        with progress("train", total, "tok", initial=behind) as bar:
            for step, (batch, waited_s) in enumerate(prefetched(rows, first, last, pinned=pinned), first):
                saving = interrupt.requested or time.monotonic() - saved > 60 * save_minutes
                for run in runs:
                    if run.state.step == step < run.config.steps and not run.diverged:
                        shown = run.advance(batch, rows, waited_s, saving, keep)
                        bar.update(run.config.batch_tokens)
                        if shown:
                            bar.set_postfix_str(shown)
                if saving:
                    saved = time.monotonic()
                unfinished = [run for run in runs if run.state.step < run.config.steps and not run.diverged]
                if not unfinished:
                    break
                if saving and interrupt.requested:
                    run = unfinished[0]
                    raise Interrupted(
                        f"stopped at step {run.state.step:,} of {run.config.steps:,}, saved in {run.out}. "
                        "Repeat the command to go on."
                    )
        return [run.diverged or run.finish() for run in runs]


def claim_run(out: Path, config: TrainConfig, provenance: dict[str, Any]) -> None:
    """Makes `out` the directory of this run. Raises: ValueError when it is another's (`sae.jobs.directory.claim`)."""
    # A setting's default is what was done before there was one: a run begun by an earlier version goes on.
    claim(out, CLAIM, {"train": config.to_dict(), "rows": provenance}, absent={"train": TrainConfig().to_dict()})


class Run:
    """One dictionary on its way through the rows: a step, and what is logged, checked, revived and saved around it."""

    def __init__(self, rows: Rows, plan: Plan, kernels: str, device: str, open_files: ExitStack) -> None:
        self.out, self.config, self.provenance = plan.out, plan.config, plan.provenance
        self.recipe = recipe_named(plan.config.recipe)
        restored = restore(self.out, rows, self.config, self.recipe, device)
        self.state = restored or _started(rows, self.config, self.recipe, kernels, device)
        self.log, self.events = (self._log(name, open_files) for name in ("metrics.jsonl", "resampled.jsonl"))
        self.tell = [
            open_files.enter_context(tracker(self.out, self.config.to_dict(), self.state.step))
            for tracker in plan.trackers
        ]
        self.logged_at, self.logged_step, self.stall_s = time.perf_counter(), self.state.step, 0.0
        self.diverged: Diverged | None = None

    def _log(self, name: str, open_files: ExitStack) -> TextIO:
        """A log, cut to the step the run goes on from."""
        if self.state.step:
            cut_log(self.out / name, self.state.step)
        else:
            (self.out / name).unlink(missing_ok=True)
        return open_files.enter_context((self.out / name).open("a"))

    def advance(self, batch: Batch, rows: Rows, waited_s: float, saving: bool, keep: int) -> str:
        """One step and what is due after it; returns what to show, if anything. What diverges is over."""
        try:
            return self._advance(batch, rows, waited_s, saving, keep)
        except Diverged as error:
            self.diverged = error
            return ""

    def _advance(self, batch: Batch, rows: Rows, waited_s: float, saving: bool, keep: int) -> str:
        state, config = self.state, self.config
        with matmul.using(state.matmul):
            metrics = train_step(state, batch, config)
        self.stall_s += waited_s
        last = state.step == config.steps
        if self.recipe.resample and state.step in config.resample_steps:
            self._log_event(_resample(state, rows, config, self.recipe))
        shown = self._log_metrics(metrics, batch.mixing) if state.step % LOG_STEPS == 0 or last else ""
        if saving or last:
            _check_weights(state, config)
            save_state(self.out, state, keep=keep)
        return shown

    def _log_metrics(self, metrics: dict[str, Tensor], mixing: float | None) -> str:
        state, config = self.state, self.config
        _check_weights(state, config)
        seconds = time.perf_counter() - self.logged_at
        pace = {
            "rows_per_s": round(config.batch_tokens * (state.step - self.logged_step) / seconds),
            "stall_share": round(self.stall_s / seconds, 4),
        }
        self.logged_at, self.logged_step, self.stall_s = time.perf_counter(), state.step, 0.0
        entry = _measured(metrics, state, config)
        if mixing is not None:
            entry["mixing"] = round(mixing, 4)
        entry |= pace
        self.log.write(json.dumps(entry) + "\n")
        self.log.flush()
        for tell in self.tell:
            tell(entry)
        return f"fvu={entry['fvu']:.4f}, l0={entry['l0']:.1f}, dead={entry['dead_share']:.1%}"

    def _log_event(self, event: dict[str, Any] | None) -> None:
        """One line per feature given a new start."""
        if event is not None:
            for feature, row, age in zip(event["features"], event["sample_rows"], event["silent_tokens"], strict=True):
                line = {"step": event["step"], "feature": feature, "parent_row": row, "silent_tokens": age}
                self.events.write(json.dumps(line) + "\n")
            self.events.flush()

    def finish(self) -> SAE:
        """The trained dictionary on raw rows, written beside its state."""
        state = self.state
        sae = fold_scale(state.sae, state.scale, state.target_scale)
        if not self.recipe.unit_norm:
            sae = fold_decoder_norms(sae)
        sae.config = _final_config(state, self.config, self.recipe, self.provenance)
        save(sae, self.out, sae.config)
        if self.recipe.coefficient and (said := sparsity_penalty.missed(state.penalty, self.config)):
            warnings.warn(f"{self.out}: {said}", stacklevel=2)
        return sae.eval().requires_grad_(False)


def _started(rows: Rows, config: TrainConfig, recipe: Recipe, kernels: str, device: str) -> TrainState:
    place = device_named(device)
    return start(rows, config, recipe, choose(kernels, place), place)


# --- what a finished run says of itself ------------------------------------------------------------------------------


def _final_config(state: TrainState, config: TrainConfig, recipe: Recipe, provenance: dict[str, Any]) -> dict[str, Any]:
    """config.json: the resolved settings, and λ in every convention in use."""
    found = sparsity_penalty.coefficient_at(state.penalty, state.step, config) if recipe.coefficient else 0.0
    return {
        "recipe": config.recipe,
        "train": config.to_dict(),
        "input_scale": state.scale,
        "kernels": state.optimizer.kernels.NAME,
        "matmul": state.matmul,
        "device": state.device.type,
        "lambda": lambda_conventions.in_every_convention(found, recipe.penalised, state.target_scale, state.sae.d_out),
        "resample_events": state.resampled,
        **provenance,
    }
